"""The live loop: what people say about answers becomes weights that serve seconds later."""
