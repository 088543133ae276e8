"""Keep the server that trials are forked from quiet: it imports this first, and then the libraries."""

from inlay.messages import quiet_imports

quiet_imports()
