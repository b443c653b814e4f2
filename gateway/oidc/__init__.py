"""OIDC: who asks with a signed token (JWT) of a trusted issuer instead of an API key. Off unless one is configured.

- `issuer`   whose tokens are believed, and how they must be; pure
- `grants`   what a token's claims let it do; pure, read from the configuration
- `signers`  the issuer's public keys: fetched beside the requests, kept while the issuer is away
- `jose`     joserfc as it is used here
- `tokens`   a token's signature and claims -> a Principal, remembered by the token's digest until it expires

A Principal made here is like one of a key: limits, budgets, models and the ledger treat both alike. Its name begins
with "oidc:", which no key's can, so nobody names himself into another's usage.

What is fetched comes through a function that is passed in (`upstreams.control` is the door). joserfc is imported when
an issuer is configured, not before. May import identity, limits.spec and the errors.
"""
