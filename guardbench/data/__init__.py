"""Real images: what each dataset is, where it lies, and its decoded pixels.

Nothing is imported here, so that the catalogue can be read without waiting for torch.
"""
