"""The teacher only prefills: top-k targets and both halves of IFD."""
