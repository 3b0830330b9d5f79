"""The live loop: people's feedback on answers becomes weights that serve seconds later."""
