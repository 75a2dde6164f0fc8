"""Authentication at upstreams by credentials that are renewed: Google's, Microsoft's and AWS's."""
