BEGIN TRANSACTION;
CREATE TABLE api_keys (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    tenant_id VARCHAR NOT NULL,
    hash VARCHAR NOT NULL,
    hint VARCHAR NOT NULL,
    description VARCHAR NOT NULL,
    created_at VARCHAR NOT NULL,
    revoked_at VARCHAR,
    last_used_at VARCHAR,
    FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    UNIQUE (hash)
);
INSERT INTO "api_keys" VALUES(1,'team','0000000000000000000000000000000000000000000000000000000000000000','instavm_sk_abcd…wxyz','CI','2026-01-02T03:04:05.000000+00:00',NULL,NULL);
CREATE TABLE egress (
    target VARCHAR NOT NULL,
    policy JSON NOT NULL,
    changed_at VARCHAR NOT NULL,
    PRIMARY KEY (target)
);
INSERT INTO "egress" VALUES('3f0f7c7e-0000-4000-8000-000000000001','{"packages": true, "http": false, "https": false, "domains": [], "cidrs": []}','2026-01-02T03:04:05.000000+00:00');
CREATE TABLE events (
    seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    at VARCHAR NOT NULL,
    session_id VARCHAR NOT NULL,
    vm_id VARCHAR,
    event VARCHAR NOT NULL,
    reason VARCHAR,
    detail VARCHAR,
    FOREIGN KEY(session_id) REFERENCES sessions (id),
    FOREIGN KEY(vm_id) REFERENCES vms (id)
);
INSERT INTO "events" VALUES(1,'2026-01-02T03:04:05.000000+00:00','3f0f7c7e-0000-4000-8000-000000000001','vm-aaaaaaaaaa','vm.ended','killed',NULL);
CREATE TABLE repeats (
    tenant_id VARCHAR NOT NULL,
    "key" VARCHAR NOT NULL,
    fingerprint VARCHAR NOT NULL,
    created_at VARCHAR NOT NULL,
    target VARCHAR NOT NULL,
    answer BLOB,
    PRIMARY KEY (tenant_id, "key"),
    FOREIGN KEY(tenant_id) REFERENCES tenants (id)
);
CREATE TABLE schema_version (
    version INTEGER NOT NULL
);
INSERT INTO "schema_version" VALUES(4);
CREATE TABLE sessions (
    id VARCHAR NOT NULL,
    tenant_id VARCHAR NOT NULL,
    created_at VARCHAR NOT NULL,
    closed_at VARCHAR,
    lifetime_s INTEGER NOT NULL,
    vcpus INTEGER NOT NULL,
    memory_mib INTEGER NOT NULL,
    image VARCHAR NOT NULL,
    metadata JSON NOT NULL,
    options JSON DEFAULT '{}' NOT NULL,
    env_keys JSON NOT NULL,
    execution_count INTEGER NOT NULL,
    execution_time_s FLOAT NOT NULL,
    cpu_time_s FLOAT NOT NULL,
    vm_seconds FLOAT NOT NULL,
    PRIMARY KEY (id),
    FOREIGN KEY(tenant_id) REFERENCES tenants (id)
);
INSERT INTO "sessions" VALUES('3f0f7c7e-0000-4000-8000-000000000001','team','2026-01-02T03:04:05.000000+00:00',NULL,300,2,512,'default','{"app": "demo"}','{}','["A"]',0,0.0,0.0,0.0);
CREATE TABLE snapshots (
    id VARCHAR NOT NULL,
    tenant_id VARCHAR NOT NULL,
    name VARCHAR,
    type VARCHAR NOT NULL,
    status VARCHAR NOT NULL,
    created_at VARCHAR NOT NULL,
    finished_at VARCHAR,
    vm_id VARCHAR,
    oci_image VARCHAR,
    digest VARCHAR,
    vcpus INTEGER NOT NULL,
    memory_mib INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    build_args JSON DEFAULT '{}' NOT NULL,
    labels JSON DEFAULT '{}' NOT NULL,
    log VARCHAR NOT NULL,
    last_error VARCHAR,
    PRIMARY KEY (id),
    FOREIGN KEY(tenant_id) REFERENCES tenants (id)
);
INSERT INTO "snapshots" VALUES('snap-aaaaaaaaaa','team','mine','user','ready','2026-01-02T03:04:05.000000+00:00','2026-01-02T03:04:05.000000+00:00',NULL,NULL,NULL,2,512,0,'{}','{}','',NULL);
CREATE TABLE tasks (
    id VARCHAR NOT NULL,
    tenant_id VARCHAR NOT NULL,
    session_id VARCHAR NOT NULL,
    vm_id VARCHAR,
    language VARCHAR NOT NULL,
    status VARCHAR NOT NULL,
    reason VARCHAR,
    created_at VARCHAR NOT NULL,
    finished_at VARCHAR,
    exit_code INTEGER,
    stdout VARCHAR NOT NULL,
    stderr VARCHAR NOT NULL,
    truncated INTEGER NOT NULL,
    execution_time_s FLOAT,
    cpu_time_s FLOAT,
    PRIMARY KEY (id),
    FOREIGN KEY(tenant_id) REFERENCES tenants (id),
    FOREIGN KEY(session_id) REFERENCES sessions (id),
    FOREIGN KEY(vm_id) REFERENCES vms (id)
);
INSERT INTO "tasks" VALUES('tsk_000000000000000000000000','team','3f0f7c7e-0000-4000-8000-000000000001','vm-aaaaaaaaaa','python','completed',NULL,'2026-01-02T03:04:05.000000+00:00','2026-01-02T03:04:05.000000+00:00',0,'hello
','',0,NULL,NULL);
CREATE TABLE tenants (
    id VARCHAR NOT NULL,
    name VARCHAR NOT NULL,
    email VARCHAR,
    created_at VARCHAR NOT NULL,
    max_sandboxes INTEGER,
    max_vcpus INTEGER,
    max_memory_mib INTEGER,
    max_lifetime_s INTEGER,
    max_disk_mib INTEGER,
    PRIMARY KEY (id)
);
INSERT INTO "tenants" VALUES('local','Local user',NULL,'2026-01-02T03:04:05.000000+00:00',NULL,NULL,NULL,NULL,NULL);
INSERT INTO "tenants" VALUES('team','team',NULL,'2026-01-02T03:04:05.000000+00:00',NULL,NULL,NULL,NULL,NULL);
CREATE TABLE vms (
    id VARCHAR NOT NULL,
    session_id VARCHAR NOT NULL,
    state VARCHAR NOT NULL,
    why VARCHAR,
    created_at VARCHAR NOT NULL,
    started_at VARCHAR,
    expires_at VARCHAR,
    ended_at VARCHAR,
    start JSON,
    PRIMARY KEY (id),
    FOREIGN KEY(session_id) REFERENCES sessions (id)
);
INSERT INTO "vms" VALUES('vm-aaaaaaaaaa','3f0f7c7e-0000-4000-8000-000000000001','ended','killed','2026-01-02T03:04:05.000000+00:00','2026-01-02T03:04:05.000000+00:00',NULL,'2026-01-02T03:04:05.000000+00:00',NULL);
CREATE INDEX sessions_of_tenant ON sessions (tenant_id, created_at);
CREATE INDEX repeats_by_age ON repeats (created_at);
CREATE INDEX snapshots_of_tenant ON snapshots (tenant_id, created_at);
CREATE INDEX vms_by_state ON vms (state);
CREATE INDEX vms_of_session ON vms (session_id, created_at);
CREATE INDEX events_of_session ON events (session_id, seq);
CREATE INDEX tasks_of_tenant ON tasks (tenant_id, created_at);
CREATE INDEX tasks_by_status ON tasks (status);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('api_keys',1);
INSERT INTO "sqlite_sequence" VALUES('events',1);
COMMIT;
