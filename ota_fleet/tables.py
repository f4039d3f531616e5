"""The tables of the registry: scripts that make them, each of which a file has seen or not.

And what makes them smaller: which devices are forgotten, and what goes with one.

A new step is one more script behind the last; one that was released never changes. What is not
PostgreSQL's as well as SQLite's says so.
"""

# application_id ("OTAF") and user_version stand in the head of SQLite's files; with PostgreSQL
# they need a table of their own. Each script is one transaction: it happens, or it does not.
SCRIPTS = (
    """
BEGIN IMMEDIATE; -- PostgreSQL: BEGIN
CREATE TABLE device (
    id         TEXT   NOT NULL PRIMARY KEY, -- a MAC as normal_id() writes it, or what was given
    project    TEXT   NOT NULL,             -- "" here and below: it never said
    chip       TEXT   NOT NULL,
    version    TEXT   NOT NULL,
    image      TEXT   NOT NULL,             -- digest of what runs: SHA-256 if it knows it, or MD5
    free_space BIGINT,                      -- bytes
    sdk        TEXT   NOT NULL,
    address    TEXT   NOT NULL,
    first_seen BIGINT NOT NULL,             -- UTC seconds, as all times
    last_seen  BIGINT NOT NULL,
    downloads  BIGINT NOT NULL,
    notes      TEXT   NOT NULL DEFAULT '',
    labels     TEXT   NOT NULL DEFAULT '[]' -- a JSON list of words
);
CREATE INDEX device_by_project ON device (project, id);
CREATE INDEX device_by_age ON device (last_seen, id);
CREATE TABLE admission (
    project TEXT NOT NULL,
    device  TEXT NOT NULL,                  -- need not have been seen
    PRIMARY KEY (project, device)
);
CREATE INDEX admission_by_device ON admission (device);
PRAGMA application_id = 1330921798;
PRAGMA user_version = 1;
COMMIT;
""",
    """
BEGIN IMMEDIATE;
CREATE TABLE device_app (                   -- the two-step protocol's own table, by its own names
    device_id        TEXT NOT NULL PRIMARY KEY,
    app_ver          TEXT NOT NULL,         -- the version to update from
    update_file_path TEXT NOT NULL
);
PRAGMA user_version = 2;
COMMIT;
""",
    """
BEGIN IMMEDIATE;
CREATE TABLE token (
    -- No id is used twice, as the audit names it. PostgreSQL: BIGINT GENERATED ALWAYS AS IDENTITY.
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    name    TEXT NOT NULL,
    role    TEXT NOT NULL,
    project TEXT NOT NULL,
    digest  TEXT NOT NULL UNIQUE            -- of the token, which is nowhere
);
PRAGMA user_version = 3;
COMMIT;
""",
    """
BEGIN IMMEDIATE;
CREATE TABLE audit (
    number BIGINT NOT NULL PRIMARY KEY,     -- 1, 2, 3... without a gap
    at     BIGINT NOT NULL,
    who    TEXT   NOT NULL,
    action TEXT   NOT NULL,
    what   TEXT   NOT NULL,
    digest TEXT   NOT NULL
);
CREATE TABLE audit_head (                   -- of the last entry, so that its removal is found
    number BIGINT NOT NULL,
    digest TEXT   NOT NULL
);
INSERT INTO audit_head VALUES (0, '');
PRAGMA user_version = 4;
COMMIT;
""",
    """
BEGIN IMMEDIATE;
CREATE TABLE stored_file (                  -- what was uploaded under a path of its own
    path   TEXT   NOT NULL PRIMARY KEY,
    sha256 TEXT   NOT NULL,                 -- also what the file is called on disk
    md5    TEXT   NOT NULL,
    size   BIGINT NOT NULL                  -- bytes
);
CREATE INDEX stored_file_by_content ON stored_file (sha256);
PRAGMA user_version = 5;
COMMIT;
""",
    """
BEGIN IMMEDIATE;
CREATE TABLE account (                      -- a person; id as that of token
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    email    TEXT   NOT NULL UNIQUE,        -- in lower case
    role     TEXT   NOT NULL,
    password TEXT   NOT NULL,               -- hashed, with how and with its salt
    created  BIGINT NOT NULL
);
CREATE TABLE session (
    digest  TEXT   NOT NULL PRIMARY KEY,    -- of what the browser has, which is nowhere
    account BIGINT NOT NULL,
    created BIGINT NOT NULL,
    expires BIGINT NOT NULL
);
ALTER TABLE token ADD COLUMN device TEXT NOT NULL DEFAULT '';   -- "": of no single device
ALTER TABLE token ADD COLUMN created BIGINT NOT NULL DEFAULT 0; -- 0: not known
PRAGMA user_version = 6;
COMMIT;
""",
    """
BEGIN IMMEDIATE;
CREATE TABLE project (                      -- that was made here, not by a file in the folder
    name    TEXT   NOT NULL PRIMARY KEY,
    chips   TEXT   NOT NULL DEFAULT '[]',   -- a JSON list; none: those of its earlier images
    created BIGINT NOT NULL
);
CREATE TABLE alias (                        -- what devices or images call a project as well
    name    TEXT NOT NULL PRIMARY KEY,
    project TEXT NOT NULL
);
CREATE TABLE release (                      -- that was uploaded, not put into the folder
    project  TEXT   NOT NULL,
    version  TEXT   NOT NULL,               -- in its normal form
    kind     TEXT   NOT NULL,
    chip     TEXT   NOT NULL,
    packed   BIGINT NOT NULL,               -- 0 or 1
    name     TEXT   NOT NULL,               -- of the file, for devices and people
    sha256   TEXT   NOT NULL,               -- also what the file is called on disk
    md5      TEXT   NOT NULL,
    size     BIGINT NOT NULL,               -- bytes
    notes    TEXT   NOT NULL DEFAULT '',
    uploaded BIGINT NOT NULL,
    who      TEXT   NOT NULL,
    PRIMARY KEY (project, version, kind, chip, packed),
    UNIQUE (project, name)
);
CREATE INDEX release_by_content ON release (sha256);
CREATE TABLE withdrawal (                   -- of a release, in the folder or uploaded
    project TEXT   NOT NULL,
    sha256  TEXT   NOT NULL,
    at      BIGINT NOT NULL,
    who     TEXT   NOT NULL,
    reason  TEXT   NOT NULL,
    PRIMARY KEY (project, sha256)
);
ALTER TABLE device ADD COLUMN pin TEXT NOT NULL DEFAULT ''; -- the one version it is to run
PRAGMA user_version = 7;
COMMIT;
""",
    """
BEGIN IMMEDIATE;
CREATE TABLE tally (                        -- of decisions
    hour      BIGINT NOT NULL,              -- UTC seconds / 3600
    project   TEXT   NOT NULL,              -- as devices called it, here and below
    checks    BIGINT NOT NULL,
    downloads BIGINT NOT NULL,              -- checks that were given an image
    PRIMARY KEY (hour, project)
);
CREATE TABLE spread (                       -- of versions over devices
    day     BIGINT NOT NULL,                -- UTC seconds / 86400
    project TEXT   NOT NULL,
    version TEXT   NOT NULL,
    devices BIGINT NOT NULL,
    PRIMARY KEY (day, project, version)
);
CREATE TABLE visit (                        -- that was not like the one before; the last of each
    number  INTEGER PRIMARY KEY AUTOINCREMENT,  -- as the id of token
    device  TEXT   NOT NULL,
    at      BIGINT NOT NULL,
    project TEXT   NOT NULL,
    version TEXT   NOT NULL,                -- that it ran
    offered TEXT   NOT NULL,                -- "": nothing
    code    TEXT   NOT NULL,                -- of the objection; "": there was none
    reason  TEXT   NOT NULL
);
CREATE INDEX visit_by_device ON visit (device, number);
CREATE TABLE draft (                        -- bytes that somebody looks at, to publish them
    id     INTEGER PRIMARY KEY AUTOINCREMENT,
    sha256 TEXT   NOT NULL,                 -- also what the file is called on disk
    name   TEXT   NOT NULL,                 -- of the file, as it came
    who    TEXT   NOT NULL,
    at     BIGINT NOT NULL
);
CREATE INDEX draft_by_content ON draft (sha256);
ALTER TABLE project ADD COLUMN partition_size BIGINT NOT NULL DEFAULT 0; -- bytes; 0: not known
ALTER TABLE project ADD COLUMN admit TEXT NOT NULL DEFAULT ''; -- open, whitelist; "": as --admit
ALTER TABLE device ADD COLUMN offered TEXT NOT NULL DEFAULT '';  -- what it was given last
ALTER TABLE device ADD COLUMN offers BIGINT NOT NULL DEFAULT 0;  -- how often, and runs it not
CREATE INDEX device_failing ON device (last_seen) WHERE offers >= 3;
PRAGMA user_version = 8;
COMMIT;
""",
    """
BEGIN IMMEDIATE;
ALTER TABLE device ADD COLUMN channel TEXT NOT NULL DEFAULT ''; -- beta; "": stable
PRAGMA user_version = 9;
COMMIT;
""",
    """
BEGIN IMMEDIATE;
CREATE TABLE attempt (                      -- of a device to run another image: its grant
    id            INTEGER PRIMARY KEY AUTOINCREMENT, -- as the id of token
    device        TEXT   NOT NULL,
    lane          TEXT   NOT NULL,          -- sketch, filesystem
    project       TEXT   NOT NULL,
    version       TEXT   NOT NULL,          -- that it was given
    sha256        TEXT   NOT NULL,
    size          BIGINT NOT NULL,          -- bytes
    digests       TEXT   NOT NULL,          -- a JSON list: what a device may call that image
    rollout       BIGINT NOT NULL,          -- 0: none
    before        TEXT   NOT NULL,          -- the version that it ran
    before_digest TEXT   NOT NULL,
    granted       BIGINT NOT NULL,
    deadline      BIGINT NOT NULL,          -- from then on it is silent
    sent          BIGINT NOT NULL DEFAULT 0,  -- bytes
    busy          BIGINT NOT NULL DEFAULT 0,  -- until when it may be downloading
    ended         BIGINT NOT NULL DEFAULT 0,  -- when the outcome was known
    outcome       TEXT   NOT NULL DEFAULT '', -- proven, returned, broken, silent; "": not known
    patience      BIGINT NOT NULL DEFAULT 0,  -- seconds that it has, once the bytes have left
    forgiven      BIGINT NOT NULL DEFAULT 0   -- 1: does not count for the loop any more
);
CREATE INDEX attempt_by_device ON attempt (device, lane, id);
CREATE INDEX attempt_by_rollout ON attempt (rollout, granted);
CREATE INDEX attempt_open ON attempt (deadline) WHERE outcome = '';
CREATE INDEX attempt_busy ON attempt (rollout, busy) WHERE outcome = '';
CREATE TABLE rollout (                      -- of a version of a project; the last one counts
    id      INTEGER PRIMARY KEY AUTOINCREMENT, -- as the id of token
    project TEXT   NOT NULL,
    version TEXT   NOT NULL,
    plan    TEXT   NOT NULL,                -- JSON
    state   TEXT   NOT NULL,
    stage   BIGINT NOT NULL,                -- from 0
    opened  BIGINT NOT NULL,
    reason  TEXT   NOT NULL,
    created BIGINT NOT NULL,
    who     TEXT   NOT NULL,                -- "": it began by itself
    excused TEXT   NOT NULL DEFAULT '[]'    -- a JSON list, by stage
);
CREATE INDEX rollout_by_version ON rollout (project, version, id);
CREATE TABLE member (                       -- a device in a rollout
    rollout  BIGINT NOT NULL,
    device   TEXT   NOT NULL,
    stage    BIGINT NOT NULL,               -- in which it was granted first
    standing TEXT   NOT NULL,               -- outcome of its last decided attempt; "": none is
    PRIMARY KEY (rollout, device)
);
CREATE INDEX member_by_device ON member (device);
CREATE TABLE result (                       -- how many members a stage has of each standing
    rollout  BIGINT NOT NULL,
    stage    BIGINT NOT NULL,
    standing TEXT   NOT NULL,
    devices  BIGINT NOT NULL,
    PRIMARY KEY (rollout, stage, standing)
);
CREATE TABLE loop (                         -- a device that was given an image too often
    device  TEXT   NOT NULL,
    sha256  TEXT   NOT NULL,
    project TEXT   NOT NULL,
    version TEXT   NOT NULL,
    at      BIGINT NOT NULL,
    PRIMARY KEY (device, sha256)
);
CREATE TABLE learned (                      -- what devices call an image, beside what it says
    sha256 TEXT NOT NULL,
    digest TEXT NOT NULL,
    PRIMARY KEY (sha256, digest)
);
CREATE TABLE policy (                       -- pin and channel of a device are in its own row
    scope    TEXT   NOT NULL,               -- project, group, device
    name     TEXT   NOT NULL,
    channel  TEXT   NOT NULL,               -- "" here and below: not said
    pin      TEXT   NOT NULL,
    hold     TEXT   NOT NULL,
    hours    TEXT   NOT NULL,               -- maintenance window
    approval TEXT   NOT NULL,
    floors   TEXT   NOT NULL,               -- a JSON list
    plan     TEXT   NOT NULL,               -- of new rollouts, JSON
    since    BIGINT NOT NULL,
    again    TEXT   NOT NULL,
    PRIMARY KEY (scope, name)
);
CREATE TABLE approval (                     -- somebody wants a device to have a version
    device  TEXT   NOT NULL,
    project TEXT   NOT NULL,
    version TEXT   NOT NULL,
    at      BIGINT NOT NULL,
    who     TEXT   NOT NULL,
    PRIMARY KEY (device, project, version)
);
CREATE TABLE shelf (                        -- the channel of a version, where it has another
    project TEXT NOT NULL,
    version TEXT NOT NULL,
    channel TEXT NOT NULL,
    PRIMARY KEY (project, version)
);
CREATE TABLE summons (                      -- a device is to be told to ask, by MQTT
    id     INTEGER PRIMARY KEY AUTOINCREMENT,
    device TEXT   NOT NULL,
    topic  TEXT   NOT NULL,
    body   TEXT   NOT NULL,
    due    BIGINT NOT NULL,
    tries  BIGINT NOT NULL DEFAULT 0
);
CREATE TABLE webhook (
    id     INTEGER PRIMARY KEY AUTOINCREMENT, -- as the id of token
    url    TEXT   NOT NULL,
    events TEXT   NOT NULL,                 -- a JSON list; none: all
    secret TEXT   NOT NULL,                 -- of signatures
    who    TEXT   NOT NULL,
    at     BIGINT NOT NULL
);
CREATE TABLE delivery (                     -- of an event to a webhook
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    webhook BIGINT NOT NULL,
    event   TEXT   NOT NULL,
    body    TEXT   NOT NULL,                -- JSON
    due     BIGINT NOT NULL,
    tries   BIGINT NOT NULL DEFAULT 0,
    failure TEXT   NOT NULL DEFAULT ''      -- of the last try
);
CREATE INDEX delivery_due ON delivery (due);
CREATE TABLE announced (                    -- a release of which webhooks know
    project TEXT NOT NULL,
    version TEXT NOT NULL,
    PRIMARY KEY (project, version)
);
ALTER TABLE device ADD COLUMN team TEXT NOT NULL DEFAULT '';      -- its group
ALTER TABLE device ADD COLUMN interval BIGINT NOT NULL DEFAULT 0; -- seconds between check-ins
ALTER TABLE device ADD COLUMN missed BIGINT NOT NULL DEFAULT 0;   -- 1: its silence was told
CREATE INDEX device_by_team ON device (team) WHERE team <> '';
PRAGMA user_version = 10;
COMMIT;
""",
)

# Whom somebody admitted, or wrote a note on, is known to a person and stays.
CROWD_OUT = """
DELETE FROM device WHERE id IN (
    SELECT id FROM device
    WHERE notes = '' AND labels = '[]' AND pin = '' AND channel = '' AND team = ''
        AND NOT EXISTS (SELECT 1 FROM admission WHERE admission.device = device.id)
    ORDER BY last_seen, id LIMIT ?)
RETURNING id
"""
# What goes with a device.
FORGET = (
    "DELETE FROM visit WHERE device = ?",
    # A rollout still counts it. If it was out, nobody will hear of it any more.
    """UPDATE result SET devices = devices - 1 WHERE standing = '' AND EXISTS (
        SELECT 1 FROM member WHERE member.device = ? AND member.standing = ''
        AND member.rollout = result.rollout AND member.stage = result.stage)""",
    """INSERT INTO result (rollout, stage, standing, devices)
    SELECT rollout, stage, 'silent', 1 FROM member WHERE device = ? AND standing = ''
    ON CONFLICT (rollout, stage, standing) DO UPDATE SET devices = result.devices + 1""",
    "DELETE FROM attempt WHERE device = ?",
    "DELETE FROM member WHERE device = ?",
    "DELETE FROM loop WHERE device = ?",
    "DELETE FROM approval WHERE device = ?",
    "DELETE FROM policy WHERE scope = 'device' AND name = ?",
)
