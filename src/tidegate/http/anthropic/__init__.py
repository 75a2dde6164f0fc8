"""Routes of Anthropic's API that Tidegate answers itself."""
