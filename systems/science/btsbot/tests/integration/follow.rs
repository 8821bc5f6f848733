//! Watching and requesting: once and only once, with a server that fails.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use kiln_btsbot::checkpoint::{Config, new_model};
use kiln_btsbot::features::FeatureOptions;
use kiln_btsbot::filter::Filter;
use kiln_btsbot::follow_up::{DryRun, FollowUp, MockSkyPortal, SkyPortal, Target};
use kiln_btsbot::model::MmCnn;
use kiln_btsbot::simulate::{Season, sources};
use kiln_btsbot::store::{RequestState, Store};
use kiln_btsbot::watch::{Packets, Round, Watch, Watcher, export};
use kiln_btsbot::{AlertReader, MmCnnConfig, Policy};
use kiln_core::{Context, Result};
use kiln_stream::{LogOptions, LogWriter};

/// A folder of packets, and a network that knows nothing.
struct Night {
    folder: tempfile::TempDir,
    cx: Context,
    config: Config,
    model: MmCnn,
    policy: Policy,
    most: Option<u64>,
    /// Sources with an alert that the policy takes.
    targets: usize,
}

impl Night {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let cx = Context::for_tests(folder.path());
        let packets = folder.path().join("packets");
        fs::create_dir(&packets).unwrap();
        let mut targets = 0;
        for source in sources(12, &Season::default(), "night", &cx) {
            let mut brightest = f64::INFINITY;
            for at in 0..source.alerts.len().min(4) {
                let alert = source.with_stamps(at, &cx);
                fs::write(packets.join(format!("{}.avro", alert.candid)), alert.to_avro()).unwrap();
                brightest = if alert.is_positive() { brightest.min(alert.magpsf) } else { brightest };
            }
            targets += usize::from(brightest < 20.0);
        }
        let network = MmCnnConfig { kernel: 3, ..MmCnnConfig::new().with_channels([2, 2]).with_side(9) };
        let config = Config::new(network, FeatureOptions::default());
        let model = new_model(&config.network, &cx);
        // Scores are all above 0: what counts is the magnitude.
        let policy = Policy::parse("n=1,score=0,mag=20").unwrap();
        Self { folder, cx, config, model, policy, most: None, targets }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn round(&self, store: &Path, mode: &str, follow_up: &dyn FollowUp) -> Result<Round> {
        self.round_of(&Packets::Folder(self.path("packets")), store, mode, follow_up)
    }

    fn round_of(
        &self,
        packets: &Packets,
        store: &Path,
        mode: &str,
        follow_up: &dyn FollowUp,
    ) -> Result<Round> {
        let watch = Watch {
            policy: self.policy.clone(),
            filter: Filter::default(),
            features: FeatureOptions::default(),
            most_requests: self.most,
            now: || 2_461_000.3,
        };
        let (store, reader) = (Store::open(store, mode)?, AlertReader::new());
        let watcher = Watcher {
            watch: &watch,
            config: &self.config,
            model: &self.model,
            reader: &reader,
            store: &store,
            follow_up,
            cx: &self.cx,
        };
        watcher.round(packets)
    }

    fn portal(&self, base: &str, token: &str) -> SkyPortal {
        let target =
            Target { allocation: 7, observation: "IFU".into(), source_groups: vec![3], ..Target::default() };
        SkyPortal::new(base, token.into(), target, Duration::from_millis(1), &self.cx).unwrap()
    }
}

#[test]
fn every_target_is_requested_once_whatever_the_server_answers() {
    let night = Night::new();
    assert!(night.targets >= 4, "{}", night.targets);
    let server = MockSkyPortal::start("secret").unwrap();
    // Answers that leave it open whether the request was taken, and one that does not.
    server.fail([(500, false), (500, true), (429, false), (503, true), (400, false)]);
    let portal = night.portal(&server.base, "secret");
    let store = night.path("w.redb");
    let round = night.round(&store, "live", &portal).unwrap();
    assert_eq!((round.triggered, round.refused, round.waiting), (night.targets, 1, 0));
    assert_eq!(round.requested, night.targets - 1);
    let mut requested = server.requested();
    requested.sort();
    requested.dedup();
    assert_eq!((requested.len(), server.requested().len()), (night.targets - 1, night.targets - 1));
    let body = &server.requests()[0];
    assert_eq!((&body["allocation_id"], &body["source_group_ids"][0]), (&7.into(), &3.into()));
    assert!(body["payload"]["start_date"].as_str().unwrap().starts_with("2025-"), "{body}");
    assert_eq!(server.saved_and_annotated(), [night.targets; 2]);
    // Again, and with a new packet that is a copy of an old one: nothing happens.
    let first = fs::read_dir(night.path("packets")).unwrap().next().unwrap().unwrap().path();
    fs::copy(first, night.path("packets/copy.avro")).unwrap();
    let again = night.round(&store, "live", &portal).unwrap();
    assert_eq!(again, Round { packets: 1, repeated: 1, ..Round::default() });
    let refusal = night.round(&store, "dry run", &DryRun).unwrap_err().to_string();
    assert!(refusal.contains("mode live"), "{refusal}");
}

#[test]
fn a_wrong_token_stops_the_watch_and_loses_nothing() {
    let night = Night::new();
    let server = MockSkyPortal::start("secret").unwrap();
    let store = night.path("w.redb");
    let error = night.round(&store, "live", &night.portal(&server.base, "wrong")).unwrap_err();
    assert!(error.to_string().contains("does not accept the token (401)"), "{error}");
    assert_eq!(server.requested().len(), 0);
    let round = night.round(&store, "live", &night.portal(&server.base, "secret")).unwrap();
    assert_eq!(round.requested, night.targets);
    assert_eq!(server.requested().len(), night.targets);
}

#[test]
fn no_night_gets_more_requests_than_allowed() {
    let mut night = Night::new();
    night.most = Some(2);
    let server = MockSkyPortal::start("secret").unwrap();
    let (store, portal) = (night.path("w.redb"), night.portal(&server.base, "secret"));
    for _ in 0..2 {
        let round = night.round(&store, "live", &portal).unwrap();
        assert_eq!((server.requested().len(), round.waiting), (2, night.targets - 2));
    }
    let open = Store::open(&store, "live").unwrap().open_requests().unwrap();
    assert!(open.len() == night.targets - 2 && open.iter().all(|kept| kept.state == RequestState::Pending));
}

#[test]
fn a_dry_run_sends_no_byte_and_a_server_that_is_away_delays_only() {
    let night = Night::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let round = night.round(&night.path("dry.redb"), "dry run", &DryRun).unwrap();
    assert_eq!(round.requested, night.targets);
    assert!(listener.accept().is_err(), "a connection was made");
    export(&Store::open(&night.path("dry.redb"), "dry run").unwrap(), &night.path("out")).unwrap();
    let requests = fs::read_to_string(night.path("out/requests.csv")).unwrap();
    assert_eq!(requests.matches(",dry,").count(), night.targets);
    // Nobody listens here any more.
    let away = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let round = night.round(&night.path("w.redb"), "live", &night.portal(&away, "secret")).unwrap();
    assert_eq!((round.requested, round.waiting), (0, night.targets));
    let server = MockSkyPortal::start("secret").unwrap();
    let round = night.round(&night.path("w.redb"), "live", &night.portal(&server.base, "secret")).unwrap();
    assert_eq!((round.requested, server.requested().len()), (night.targets, night.targets));
}

#[test]
fn the_token_goes_nowhere_in_the_clear() {
    let cx = Context::for_tests("unused");
    for base in [
        "http://fritz.science",
        "ftp://a.b",
        "fritz.science",
        "https://",
        "http://localhost@evil.org",
        "http://127.0.0.1.evil.org",
    ] {
        let portal = SkyPortal::new(base, "t".into(), Target::default(), Duration::ZERO, &cx);
        assert!(portal.is_err(), "{base}");
    }
    for base in ["https://fritz.science", "http://localhost:5000/", "http://127.0.0.1:1", "http://[::1]:80"] {
        assert!(SkyPortal::new(base, "t".into(), Target::default(), Duration::ZERO, &cx).is_ok(), "{base}");
    }
}

#[test]
fn a_log_is_followed_from_where_it_was_left() {
    let night = Night::new();
    let log = night.path("log");
    let mut files: Vec<_> =
        fs::read_dir(night.path("packets")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let (packets, store) = (Packets::Stream(log.clone()), night.path("w.redb"));
    let server = MockSkyPortal::start("secret").unwrap();
    let portal = night.portal(&server.base, "secret");
    let round = || night.round_of(&packets, &store, "live", &portal);
    assert!(round().unwrap_err().to_string().contains("log"));
    let mut writer = LogWriter::open(&log, LogOptions::default()).unwrap();
    let mut all = Round::default();
    // In three parts, of which the last has everything once more.
    let (first, second) = files.split_at(files.len() / 3);
    for part in [first, second, &files] {
        part.iter().for_each(|file| _ = writer.append(&fs::read(file).unwrap()).unwrap());
        let taken = round().unwrap();
        assert_eq!(taken.packets, part.len());
        all = all.then(taken);
        assert_eq!(round().unwrap(), Round::default());
    }
    assert_eq!((all.scored + all.rejected, all.repeated), (files.len(), files.len()));
    assert_eq!((all.triggered, all.requested), (night.targets, night.targets));
    assert_eq!(server.requested().len(), night.targets);
    // Another log at the same place is not taken for the one that was read.
    drop(writer);
    fs::remove_dir_all(&log).unwrap();
    LogWriter::open(&log, LogOptions::default()).unwrap().append(b"no packet").unwrap();
    assert!(round().unwrap_err().to_string().contains("ends with record 1"));
}
