"""What runs left in a store: opened, audited, exported, cleaned. Needs no cluster and no server.

The decision here: everything is read through the same scan by which an attempt resumes, so that
what a person sees is what a run would go on from.
"""
