"""Things that live on at a provider after the call that made them: batches and resources."""
