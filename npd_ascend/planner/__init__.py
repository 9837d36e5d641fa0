"""`npd plan`: memory of every card and time of every stage, before anything is started.

layer: bytes of one decoder layer, counted on tensors without values through the layers that train.
fused: stand-ins for fused operators of devices that are not here.
memory: bytes of a card in each role, part by part.   rates: what is measured here and what is assumed, with sources.
timing: seconds of the stages.   command: the table, and layouts that fit where the configured one does not.
"""
