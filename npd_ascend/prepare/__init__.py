"""`npd prepare`: files of questions and answers to what `data:` of a run reads."""
