"""The web page of `vlabs demo-page`: ask a model about an image, see where it looks, and search images by text."""
