"""The environment variables that the pipelines' programs, and PostgreSQL, inherit from the process that starts the stack.

All others are withheld: they may contain passwords, tokens and cloud credentials, and Pachyderm copies the environment of every datum into
a repo. In a cluster, a pipeline's program inherits nothing from its node. A program gets the secrets that its pipeline names.
"""

from collections.abc import Mapping

# Paths, language, time zone, trusted certificates, caches, threads and devices.
_NAMES = frozenset(
    {
        *("HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "XDG_CACHE_HOME"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NO_PROXY", "no_proxy"),
        *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "QA_CACHE_DIR", "QA_THREADS", "QA_DEVICE"),
        *("CUDA_VISIBLE_DEVICES", "PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED"),
    }
)
_PREFIXES = ("LC_", "OMP_", "MKL_", "OPENBLAS_")
# Proxy addresses may contain a password.
_PROXIES = frozenset({"HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"})


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of an environment that may be passed on."""
    return {name: value for name, value in environment.items() if _may_be_seen(name, value)}


def _may_be_seen(name: str, value: str) -> bool:
    return name in _NAMES or name.startswith(_PREFIXES) or (name in _PROXIES and "@" not in value)
