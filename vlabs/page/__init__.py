"""The web page of `vlabs demo-page`: ask a model about a picture, see where it looks, and search pictures by text."""
