"""Regularisers: what may be added to the loss of any network that is trained on real images."""
