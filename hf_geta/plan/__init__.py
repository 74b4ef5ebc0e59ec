"""WHAT will it cost? A run's plan, before anything is loaded or trained."""
