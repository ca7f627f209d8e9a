//! A real database: PostgreSQL in a mounted volume, pushed, and started on the other node.

use std::{
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use flocker_tests::{Cluster, LONG, needs, require, scratch::run, wait_until};

/// 1.5 million accounts: about 190 MB of tables and indexes.
const SCALE: &str = "13";

/// A server running on a data directory, as its own user. Killed when dropped.
struct Server {
    process: Child,
    sockets: PathBuf,
}

fn as_postgres(program: &str) -> Command {
    let (uid, gid) = needs::user("postgres").unwrap();
    let program = needs::postgres_bin().unwrap().join(program);
    let mut command = Command::new(needs::program("setpriv").unwrap());
    command.args(["--pdeathsig", "KILL", "--clear-groups"]).args([format!("--reuid={uid}"), format!("--regid={gid}")]);
    command.arg(program).current_dir("/").env("LC_ALL", "C.UTF-8").env_remove("PGDATA");
    command
}

impl Server {
    fn start(data: &Path, sockets: &Path) -> Self {
        let log = fs::File::options().create(true).append(true).open(sockets.join("server.log")).unwrap();
        let mut command = as_postgres("postgres");
        command.arg("-D").arg(data).args(["-c", "listen_addresses=", "-c", "max_wal_size=1GB", "-c"]);
        command.arg(format!("unix_socket_directories={}", sockets.display()));
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let mut server = Self { process: command.spawn().unwrap(), sockets: sockets.to_owned() };
        wait_until("PostgreSQL answers", LONG, || {
            if let Some(status) = server.process.try_wait().unwrap() {
                panic!("PostgreSQL ended: {status}\n{}", fs::read_to_string(sockets.join("server.log")).unwrap());
            }
            let ready = server.client("pg_isready").output().unwrap();
            ready.status.success().then_some(())
        });
        server
    }

    fn client(&self, program: &str) -> Command {
        let mut command = as_postgres(program);
        command.env("PGHOST", &self.sockets).env("PGUSER", "postgres").env("PGDATABASE", "postgres");
        command
    }

    fn query(&self, sql: &str) -> String {
        run(self.client("psql").args(["-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql]))
    }

    /// Returns a number for the contents of every table of the benchmark.
    fn checksum(&self) -> String {
        let tables = ["pgbench_accounts", "pgbench_branches", "pgbench_tellers", "pgbench_history"];
        let sum =
            |table| self.query(&format!("select count(*), sum(hashtextextended(t::text, 0)::numeric) from {table} t"));
        tables.map(sum).concat()
    }

    fn load(&self, transactions: &str) {
        run(self.client("pgbench").args(["-n", "-c", "2", "-t", transactions]));
    }

    fn checkpoint_and_stop(mut self) {
        self.query("checkpoint");
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        let status = wait_until("PostgreSQL stops", LONG, || self.process.try_wait().unwrap());
        assert!(status.success(), "{status}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_postgresql_database_moves_to_another_node() {
    if !require("postgres") {
        return;
    }
    let mut cluster = Cluster::start(2);
    let owner = needs::user("postgres").unwrap();
    let sockets = cluster.scratch.folder("sock");
    chown(&sockets, Some(owner.0), Some(owner.1)).unwrap();
    let places = ["pg-a", "pg-b"].map(|name| cluster.scratch.path().join(name));
    let (a, b) = cluster.pair();

    a.cli(&["create", "pg", "-m", "application=postgresql"]).ok();
    a.cli(&["mount", "pg", places[0].to_str().unwrap()]).ok();
    let data = places[0].join("data");
    fs::create_dir(&data).unwrap();
    chown(&data, Some(owner.0), Some(owner.1)).unwrap();
    run(as_postgres("initdb").arg("-D").arg(&data).args(["-U", "postgres", "-A", "trust", "--data-checksums"]));
    let server = Server::start(&data, &sockets);
    run(server.client("pgbench").args(["-i", "-q", "-s", SCALE]));
    server.checkpoint_and_stop();
    let taken = a.cli(&["snapshot", "pg@loaded"]).ok().json();
    assert!(taken["logical_bytes"].as_u64().unwrap() > 150_000_000, "{taken}");
    let full = a.push("pg@loaded", "host-b");

    let server = Server::start(&data, &sockets);
    server.load("300");
    let expected = server.checksum();
    server.checkpoint_and_stop();
    a.cli(&["snapshot", "pg@used"]).ok();
    let incremental = a.push("pg@used", "host-b");
    let bytes = |transfer: &serde_json::Value| transfer["progress"]["delta_bytes"].as_u64().unwrap();
    eprintln!("full {} bytes, incremental {} bytes", bytes(&full), bytes(&incremental));
    assert!(bytes(&incremental) * 3 < bytes(&full), "{incremental}");

    let moved = a.cli(&["handoff", "pg", "host-b"]).ok().json();
    eprintln!("handed over, nobody could write for {} ms", moved["writes_stopped_ms"]);
    b.cli(&["mount", "pg", places[1].to_str().unwrap()]).ok();
    let server = Server::start(&places[1].join("data"), &sockets);
    assert_eq!(server.checksum(), expected);
    server.query("create extension if not exists amcheck");
    run(server.client("pg_amcheck").args(["--heapallindexed", "postgres"]).stdin(Stdio::null()));
    server.load("50");
    server.checkpoint_and_stop();
    run(as_postgres("pg_checksums").args(["--check", "-D"]).arg(places[1].join("data")));

    // And home again, with what was written there.
    let server = Server::start(&places[1].join("data"), &sockets);
    let expected = server.checksum();
    server.checkpoint_and_stop();
    b.cli(&["handoff", "pg", "host-a"]).ok();
    a.cli(&["mount", "pg", places[0].to_str().unwrap()]).ok();
    let server = Server::start(&data, &sockets);
    assert_eq!(server.checksum(), expected);
    server.checkpoint_and_stop();
}
