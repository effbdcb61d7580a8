"""The training loop: it owns when, an algorithm owns what. No algorithm's name occurs here."""
