"""WHAT is shipped? Physically smaller modules, packed codes, and the manifest."""
