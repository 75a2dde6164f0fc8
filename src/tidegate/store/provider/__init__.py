"""Providers on record: what lives on there after its call, their upstreams, compared costs."""
