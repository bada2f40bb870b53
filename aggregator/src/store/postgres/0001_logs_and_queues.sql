-- Logs with a head that moves by compare-and-set, and queues with leases. Names sort by their bytes.

CREATE TABLE commonweal_log (
    name TEXT COLLATE "C" PRIMARY KEY,
    head BIGINT NOT NULL CHECK (head > 0)
);

CREATE TABLE commonweal_entry (
    log      TEXT COLLATE "C" NOT NULL,
    sequence BIGINT NOT NULL,
    value    BYTEA NOT NULL,
    PRIMARY KEY (log, sequence)
);

CREATE TABLE commonweal_item (
    queue          TEXT COLLATE "C" NOT NULL,
    key            TEXT COLLATE "C" NOT NULL,
    value          BYTEA NOT NULL,
    owner          TEXT COLLATE "C" NOT NULL DEFAULT '',
    lease_until_ms BIGINT NOT NULL DEFAULT 0,
    acknowledged   BOOLEAN NOT NULL DEFAULT FALSE,
    PRIMARY KEY (queue, key)
);

-- Who drives, and until when by this server's clock.
CREATE TABLE commonweal_lead (
    name  TEXT COLLATE "C" PRIMARY KEY,
    owner TEXT COLLATE "C" NOT NULL,
    until TIMESTAMPTZ NOT NULL
);

-- Values are packed already; trying to compress them costs time and gains nothing.
ALTER TABLE commonweal_entry ALTER COLUMN value SET STORAGE EXTERNAL;
ALTER TABLE commonweal_item ALTER COLUMN value SET STORAGE EXTERNAL;
