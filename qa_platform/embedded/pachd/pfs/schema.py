"""The tables of projects, repos, branches, commits and their provenance."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS project (name TEXT PRIMARY KEY, description TEXT NOT NULL, created REAL NOT NULL);
INSERT OR IGNORE INTO project VALUES ('default', '', CAST(strftime('%s', 'now') AS REAL));
CREATE TABLE IF NOT EXISTS repo (
    pk INTEGER PRIMARY KEY, project TEXT NOT NULL, name TEXT NOT NULL, type TEXT NOT NULL, description TEXT NOT NULL,
    created REAL NOT NULL, UNIQUE (project, name, type)
);
CREATE TABLE IF NOT EXISTS commit_ (
    pk INTEGER PRIMARY KEY AUTOINCREMENT, repo INTEGER NOT NULL REFERENCES repo(pk) ON DELETE CASCADE,
    id TEXT NOT NULL, branch TEXT NOT NULL,
    parent INTEGER REFERENCES commit_(pk) ON DELETE SET NULL, kind INTEGER NOT NULL, description TEXT NOT NULL, started REAL NOT NULL,
    finishing REAL, finished REAL, error TEXT NOT NULL DEFAULT '', root TEXT, size INTEGER NOT NULL DEFAULT 0,
    UNIQUE (repo, id)
);
CREATE INDEX IF NOT EXISTS commit_by_id ON commit_ (id);
CREATE INDEX IF NOT EXISTS commit_by_parent ON commit_ (parent);
CREATE INDEX IF NOT EXISTS commit_unfinished ON commit_ (finishing) WHERE finished IS NULL;
CREATE TABLE IF NOT EXISTS commit_provenance (
    downstream INTEGER NOT NULL REFERENCES commit_(pk) ON DELETE CASCADE,
    upstream INTEGER NOT NULL REFERENCES commit_(pk) ON DELETE CASCADE,
    PRIMARY KEY (downstream, upstream)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS commit_provenance_upstream ON commit_provenance (upstream);
CREATE TABLE IF NOT EXISTS branch (
    pk INTEGER PRIMARY KEY, repo INTEGER NOT NULL REFERENCES repo(pk) ON DELETE CASCADE, name TEXT NOT NULL,
    head INTEGER NOT NULL REFERENCES commit_(pk), created REAL NOT NULL, updated REAL NOT NULL, UNIQUE (repo, name)
);
CREATE INDEX IF NOT EXISTS branch_by_head ON branch (head);
CREATE TABLE IF NOT EXISTS branch_provenance (
    downstream INTEGER NOT NULL REFERENCES branch(pk) ON DELETE CASCADE, upstream INTEGER NOT NULL REFERENCES branch(pk),
    PRIMARY KEY (downstream, upstream)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS branch_provenance_upstream ON branch_provenance (upstream);
CREATE TABLE IF NOT EXISTS layer (
    commit_ INTEGER NOT NULL REFERENCES commit_(pk) ON DELETE CASCADE, seq INTEGER NOT NULL, fileset TEXT NOT NULL,
    PRIMARY KEY (commit_, seq)
) WITHOUT ROWID;
"""
