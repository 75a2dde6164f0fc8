"""The live page for the person who operates a deployment, and what it is fed with."""

from tidegate.dashboard.routes import install

__all__ = ["install"]
