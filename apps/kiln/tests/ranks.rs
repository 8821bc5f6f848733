//! Ranks that are processes: started together, ended together, whatever happens to one of them.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

fn kiln(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    command.args(arguments.split_whitespace()).env_remove("KILN_CLUSTER_TOKEN");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The processes that this one has started.
fn children(parent: &Child) -> Vec<u32> {
    let id = parent.id();
    let tasks = fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<u32>>())
        .collect()
}

fn environment(process: u32, name: &str) -> Option<String> {
    let all = fs::read(format!("/proc/{process}/environ")).ok()?;
    let mut entries = all.split(|&byte| byte == 0).map(String::from_utf8_lossy);
    entries.find_map(|entry| entry.strip_prefix(name)?.strip_prefix('=').map(str::to_string))
}

fn alive(process: u32) -> bool {
    let state = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    state.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}

/// Starts four ranks that never stop adding, sends one of them a signal, and gives what all printed.
fn interfere(signal: &str) -> (Output, Vec<u32>) {
    let sizes = ["16M"; 200].join(",");
    let work = format!("cluster bench -n 4 --timeout 2s --algorithms ring --bytes {sizes}");
    let launcher = kiln(&format!("launch -n 4 --timeout 2s -- {work}")).spawn().unwrap();
    let started = Instant::now();
    let ranks = loop {
        let ranks = children(&launcher);
        if ranks.len() == 4 && ranks.iter().all(|&rank| environment(rank, "KILN_RANK").is_some()) {
            break ranks;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "the ranks do not start");
        thread::sleep(Duration::from_millis(20));
    };
    thread::sleep(Duration::from_millis(700)); // into the work
    let victim = ranks.iter().find(|&&rank| environment(rank, "KILN_RANK").as_deref() == Some("1")).unwrap();
    assert!(Command::new("kill").args([signal, &victim.to_string()]).status().unwrap().success());
    (launcher.wait_with_output().unwrap(), ranks)
}

#[test]
fn a_killed_rank_ends_the_others_with_its_name() {
    let (output, ranks) = interfere("-KILL");
    let text = text(&output);
    assert_eq!(output.status.code(), Some(137), "{text}");
    for rank in [0, 2, 3] {
        let told = text.lines().any(|line| {
            line.starts_with(&format!("[rank {rank}] error")) && line.contains("rank 1 was lost")
        });
        assert!(told, "rank {rank}: {text}");
    }
    assert!(!ranks.into_iter().any(alive));
}

#[test]
fn a_stopped_rank_ends_the_others_after_the_time_out() {
    let (output, ranks) = interfere("-STOP");
    let text = text(&output);
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("rank 1"), "{text}");
    assert!(!ranks.into_iter().any(alive));
}

#[test]
fn a_command_starts_its_own_ranks() {
    let output = kiln("cluster probe -n 3 --backend tcp --json").output().unwrap();
    let links: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(links.as_array().unwrap().len(), 3, "{links}");
    assert!(links[0]["bandwidth_bytes_per_s"].as_f64().unwrap() > 0.0);
}

#[test]
fn the_exit_code_is_that_of_the_ranks() {
    let output = kiln("launch -n 2 -- cluster probe -n 3").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output).contains("[rank 1] error: the command runs on 3 ranks, but 2 were started"));
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn strangers_do_not_disturb_the_ranks() {
    let port = free_port();
    let launch = |rank: usize, token: &str| {
        kiln(&format!(
            "launch -n 1 --ranks 2 --first {rank} --rendezvous 127.0.0.1:{port} --cluster-token {token} \
             -- cluster probe -n 2 --json"
        ))
        .spawn()
        .unwrap()
    };
    let first = launch(0, "secret");
    let visit = |words: &[u8]| {
        let begun = Instant::now();
        let mut stream = loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => break stream,
                Err(_) => assert!(begun.elapsed() < Duration::from_secs(20), "nobody listens"),
            }
            thread::sleep(Duration::from_millis(20));
        };
        stream.write_all(words).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        _ = stream.read_to_end(&mut Vec::new()); // until they hang up
    };
    visit(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n and more words than a greeting has");
    visit(&[0xff; 4096]);
    visit(&[&b"KILNRANK"[..], &99u32.to_le_bytes(), &[7; 64]].concat());
    visit(&[&b"KILNRANK"[..], &1u32.to_le_bytes(), &[7; 64]].concat());

    let wrong = launch(1, "guess").wait_with_output().unwrap();
    assert!(!wrong.status.success());
    assert!(text(&wrong).contains("--cluster-token"), "{}", text(&wrong));

    let second = launch(1, "secret").wait_with_output().unwrap();
    assert!(second.status.success(), "{}", text(&second));
    let first = first.wait_with_output().unwrap();
    assert!(first.status.success(), "{}", text(&first));
    let text = text(&first);
    assert!(text.contains("not a rank of Kiln") && text.contains("protocol version 99"), "{text}");
    assert!(text.contains("latency_s"), "{text}");
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let output =
        kiln(&format!("launch -n 2 --rendezvous 127.0.0.1:{port} -- cluster probe")).output().unwrap();
    let text = text(&output);
    assert!(
        text.contains(&format!("cannot listen at 127.0.0.1:{port}")) && text.contains("ss -ltnp"),
        "{text}"
    );
}

/// Step and loss of each line of a training's log.
fn losses(folder: &std::path::Path) -> Vec<(String, String)> {
    let log = fs::read_to_string(folder.join("log.csv")).unwrap();
    let cells = log.lines().skip(1).map(|line| line.split(',').map(str::to_string).collect::<Vec<_>>());
    cells.map(|cells| (cells[0].clone(), cells[1].clone())).collect()
}

#[test]
fn a_training_survives_the_loss_of_a_rank() {
    let desk = tempfile::tempdir().unwrap();
    let text = desk.path().join("a.txt");
    fs::write(&text, "to be or not to be, that is the question. ".repeat(60)).unwrap();
    let train = |out: &str| {
        let (text, out) = (text.display(), desk.path().join(out));
        format!(
            "megatron train --text {text} --out {} --steps 400 --save-every 20 --layers 2 --hidden 32 --heads 2 \
             --seq 32 --batch 8 --tensor 2 --quiet",
            out.display()
        )
    };
    // Threads, processes: the same bits, for sums are in rank order on both.
    let whole = kiln(&train("whole")).output().unwrap();
    assert!(whole.status.success(), "{}", self::text(&whole));

    let launcher = kiln(&format!("launch -n 2 -- {}", train("cut"))).spawn().unwrap();
    let checkpoints = desk.path().join("cut");
    let started = Instant::now();
    while !complete(&checkpoints) {
        assert!(started.elapsed() < Duration::from_secs(60), "no checkpoint");
        thread::sleep(Duration::from_millis(2));
    }
    let ranks = children(&launcher);
    let second = ranks.into_iter().find(|&rank| environment(rank, "KILN_RANK").as_deref() == Some("1"));
    let killed = Command::new("kill").args(["-KILL", &second.unwrap().to_string()]).status().unwrap();
    assert!(killed.success());
    let output = launcher.wait_with_output().unwrap();
    assert!(!output.status.success(), "the run was over before the rank was killed");
    assert!(self::text(&output).contains("rank 1 was lost"), "{}", self::text(&output));
    assert!(losses(&checkpoints).len() < 400);

    let resumed = kiln(&format!("launch -n 2 -- {} --resume", train("cut"))).output().unwrap();
    assert!(resumed.status.success(), "{}", self::text(&resumed));
    assert_eq!(losses(&checkpoints), losses(&desk.path().join("whole")));
}

/// Whether a folder has a finished checkpoint.
fn complete(folder: &std::path::Path) -> bool {
    let inside = |folder: &std::path::Path| fs::read_dir(folder).into_iter().flatten().flatten();
    inside(folder).any(|entry| {
        entry.path().join("COMPLETE").exists()
            || inside(&entry.path()).any(|entry| entry.path().join("COMPLETE").exists())
    })
}
