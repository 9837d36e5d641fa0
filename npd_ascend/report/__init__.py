"""What a run folder says about itself: summary.json, summary.txt and one self-contained page."""
