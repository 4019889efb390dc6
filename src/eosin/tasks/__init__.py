"""Recipes a person names: they join the layers below into one job."""
