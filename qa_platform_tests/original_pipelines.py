"""The specifications of the two original pipelines that deployments upgrade from."""

from typing import Any

from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE

# Their shapes in deployments: one has a cron input and bash with lines on its standard input; the other has glob "/", a script, and seven
# variables from one secret.
OLD_TICKING: dict[str, Any] = {
    "pipeline": {"name": ANSWER_PIPELINE},
    "description": "Fetches files from a bucket and answers their questions.",
    "transform": {
        "cmd": ["/bin/bash"],
        "stdin": [
            "pfs=${QA_PFS_ROOT:-/pfs}",
            "echo $GCS_ACCESS > $pfs/raw.txt",
            "base64 --decode $pfs/raw.txt > $pfs/account.json",
            "export GOOGLE_APPLICATION_CREDENTIALS=$pfs/account.json",
            'test "$(cat $GOOGLE_APPLICATION_CREDENTIALS)" = "{}" && echo "from $STORAGE_BUCKET" > $pfs/out/answers_1.csv',
        ],
        "image": "someone/answers:0123456789abcdef0123456789abcdef01234567",
        "secrets": [
            {"name": "gcsaccess", "env_var": "GCS_ACCESS", "key": "creds"},
            {"name": "gcsaccess", "env_var": "STORAGE_BUCKET", "key": "storage_bucket"},
        ],
    },
    "input": {"cron": {"name": "tick", "spec": "@every 60s"}},
}
DATABASE_VARIABLES = {
    "PG_HOST": "host",
    "PG_PASSWORD": "password",
    "PG_USER": "user",
    "PG_DBNAME": "dbname",
    "PG_SSLROOTCERT": "sslrootcert",
    "PG_SSLCLIENT_CERT": "sslcert",
    "PG_SSL_CLIENT_KEY": "sslkey",
}
OLD_PUSHING = {
    "pipeline": {"name": LOAD_PIPELINE},
    "description": "Pushes answers to the database.",
    "transform": {
        "cmd": ["python", "-c", "import os; print(os.environ['PG_HOST'], os.listdir(os.environ['question_answer']))"],
        "image": "someone/pushes:0123456789abcdef0123456789abcdef01234567",
        "secrets": [{"name": "dbaccess", "env_var": name, "key": key} for name, key in DATABASE_VARIABLES.items()],
    },
    "input": {"pfs": {"repo": ANSWER_PIPELINE, "glob": "/"}},
}
