//! Claim 5: from packets to requests, through kills and failures of the server.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use kiln_core::{
    Claim, Context, Error, ErrorKind, OutputMode, Report, Result, Table, Threshold, write_atomic,
};
use rand::RngExt;

use super::{Plan, Repetition};
use crate::features::FeatureOptions;
use crate::filter::Filter;
use crate::follow_up::{FollowUp, MockSkyPortal, Outcome, Request, SkyPortal, Target};
use crate::packet::AlertReader;
use crate::policy::Policy;
use crate::scores::sources;
use crate::simulate::{self, Simulated};
use crate::store::Store;
use crate::train::predict;
use crate::watch::{Packets, Watch, Watcher};

/// A server of which the program dies now and then: before the message goes out, or before the answer is noted.
struct Dying<'a> {
    inner: &'a SkyPortal,
    /// How many calls from now it dies, and whether the message still goes out.
    fate: Cell<(usize, bool)>,
}

impl FollowUp for Dying<'_> {
    fn send(&self, request: &Request) -> Result<Outcome> {
        let (left, goes_out) = self.fate.get();
        if left > 0 {
            self.fate.set((left - 1, goes_out));
            return self.inner.send(request);
        }
        if goes_out {
            self.inner.send(request)?;
        }
        Err(Error::interrupted("killed"))
    }

    fn stands(&self, request: &Request) -> Result<std::result::Result<bool, String>> {
        self.inner.stands(request)
    }

    fn is_live(&self) -> bool {
        true
    }
}

/// Claim 5: packets become exactly the right requests, through kills and failures of the server.
pub(super) fn report(
    report: &mut Report,
    plan: &Plan,
    policy: &Policy,
    run: &Repetition,
    cx: &Context,
) -> Result<()> {
    let folder = tempfile::tempdir().map_err(Error::io("create", "a temporary folder"))?;
    let packets = folder.path().join("packets");
    fs::create_dir(&packets).map_err(Error::io("create", &packets))?;
    let watched: Vec<Simulated> = run.tested.iter().take(plan.watched).cloned().collect();
    let mut written = 0;
    for source in &watched {
        for at in (0..source.alerts.len()).take(plan.most_judged.max(8)) {
            let alert = source.with_stamps(at, cx);
            write_atomic(&packets.join(format!("{}.avro", alert.candid)), &alert.to_avro())?;
            written += 1;
        }
    }
    let server = MockSkyPortal::start("token")?;
    server.fail([(500, false), (500, true), (429, false), (503, true)]);
    let target = Target { allocation: 1, observation: "IFU".into(), ..Target::default() };
    let quiet = Context { output: OutputMode::Quiet, ..cx.clone() };
    let portal = SkyPortal::new(&server.base, "token".into(), target, Duration::from_millis(1), &quiet)?;
    let watch = Watch {
        policy: policy.clone(),
        filter: Filter::default(),
        features: FeatureOptions::default(),
        most_requests: None,
        now: || 0.0,
    };
    let reader = AlertReader::new();
    let mut rng = cx.rng("kill", 0);
    let mut kills = 0;
    // Every life ends at a random request, until one lasts.
    loop {
        let store = Store::open(&folder.path().join("watch.redb"), "live")?;
        let fate =
            Cell::new(if kills < 4 { (rng.random_range(0..3), kills % 2 == 0) } else { (usize::MAX, true) });
        let dying = Dying { inner: &portal, fate };
        let watcher = Watcher {
            watch: &watch,
            config: &run.config,
            model: &run.models[0],
            reader: &reader,
            store: &store,
            follow_up: &dying,
            cx: &quiet,
        };
        match watcher.round(&Packets::Folder(packets.clone())) {
            Ok(_) => break,
            Err(error) if error.kind() == ErrorKind::Interrupted && !cx.interrupted() => kills += 1,
            Err(error) => return Err(error),
        }
    }
    // What should have come of it, without any watch.
    let data = simulate::dataset(
        &first_alerts(&watched, plan.most_judged.max(8)),
        run.config.network.side,
        usize::MAX,
        cx,
    )?;
    let all: Vec<usize> = (0..data.len()).collect();
    let scored = data.scored(&all, &predict(&run.models[0], &data, &all, 1.0, &quiet)?);
    let expected: BTreeSet<String> = sources(&scored)?
        .iter()
        .filter(|source| policy.trigger(&source.alerts).is_some())
        .map(|source| source.id.to_string())
        .collect();
    let requested = server.requested();
    let once: BTreeSet<String> = requested.iter().cloned().collect();
    let doubled = requested.len() - once.len();
    let (missing, wrong) = (expected.difference(&once).count(), once.difference(&expected).count());
    let mut table = Table::new("From packets to requests", &["figure", "value"]);
    for (name, value) in [
        ("packets", written),
        ("times that the watch was killed and started again", kills),
        ("sources that are targets", expected.len()),
        ("requests that the server has", requested.len()),
        ("missing", missing),
        ("doubled", doubled),
        ("for sources that are no targets", wrong),
    ] {
        table.row([name.to_string(), value.to_string()]);
    }
    report.tables.push(table);
    report.claims.push(Claim::new(
        "Every target is requested exactly once, through kills and server errors",
        "requests are sent without a person",
        if expected.is_empty() { f64::NAN } else { (missing + doubled + wrong) as f64 },
        "requests missing, doubled or wrong",
        Threshold::AtMost(0.0),
    ));
    Ok(())
}

/// The sources with the first of their alerts.
fn first_alerts(sources: &[Simulated], count: usize) -> Vec<Simulated> {
    let mut sources = sources.to_vec();
    sources.iter_mut().for_each(|source| source.alerts.truncate(count));
    sources
}
