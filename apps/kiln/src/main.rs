//! The binary: reads the command line, prepares the context, and turns errors into exit codes.

mod cli;
mod commands;
mod graphs;
mod programs;
mod ranks;

use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use clap::FromArgMatches;
use kiln::SYSTEMS;
use kiln::core::{Context, Error, ErrorKind, OutputMode, Result};

use cli::{Cli, DeviceName, Global, Verb};

#[global_allocator]
static ALLOCATOR: kiln::ops::TensorAllocator = kiln::ops::TensorAllocator;

fn main() -> ExitCode {
    panic::set_hook(Box::new(report_panic));
    kiln::ops::keep_freed_memory();
    let matches = cli::command().get_matches();
    let global = Global::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let outcome = context(&global).map(|cx| {
        // The hook has told the user; what remains is the exit code.
        let work = panic::catch_unwind(AssertUnwindSafe(|| dispatch(&matches, &cx)));
        work.unwrap_or_else(|_| Ok(ExitCode::FAILURE)).unwrap_or_else(|error| fail(&error, &cx))
    });
    outcome.unwrap_or_else(|error| fail(&error, &Context::new()))
}

fn context(global: &Global) -> Result<Context> {
    let mut cx = Context::new();
    cx.seed = global.seed;
    cx.networks = Some(|model, cx| commands::network(SYSTEMS, model, cx));
    cx.output = match (global.json, global.quiet) {
        (true, _) => OutputMode::Json,
        (_, true) => OutputMode::Quiet,
        _ => OutputMode::Human,
    };
    match global.device {
        DeviceName::Cpu => {} // the context's own default
    }
    if let Some(threads) = global.threads {
        cx.threads = threads.into();
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(cx.threads)
        .build_global()
        .map_err(|e| Error::work(format!("cannot start {} threads", cx.threads)).caused_by(e))?;
    stop_on_ctrl_c(&cx)?;
    Ok(cx)
}

/// The first Ctrl-C asks the work to save and leave, the second leaves at once.
fn stop_on_ctrl_c(cx: &Context) -> Result<()> {
    let flag = cx.interrupt_flag();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\nstopping (Ctrl-C again to leave at once)");
    })
    .map_err(|e| Error::work("cannot watch for Ctrl-C").caused_by(e))
}

fn dispatch(matches: &clap::ArgMatches, cx: &Context) -> Result<ExitCode> {
    let typed = matches.subcommand();
    if let Some((slug, arguments)) = typed
        && let Some(system) = commands::find(SYSTEMS, slug)
    {
        return system.execute(arguments, cx).map(|()| ExitCode::SUCCESS);
    }
    let verb = Cli::from_arg_matches(matches).unwrap_or_else(|error| error.exit()).verb;
    match verb {
        Verb::List => commands::list(SYSTEMS, cx),
        Verb::Show { slug } => commands::show(commands::known(SYSTEMS, &slug)?, cx),
        Verb::Run { slug, scale, out } => commands::run(commands::known(SYSTEMS, &slug)?, scale, out, cx),
        Verb::Tour { scale, out } => commands::tour(SYSTEMS, scale, &out, cx),
        Verb::Export { model, out } => commands::export(SYSTEMS, &model, &out, cx),
        Verb::Graph { verb } => graphs::execute(verb, SYSTEMS, cx),
        Verb::Compile { verb } => programs::execute(&verb, SYSTEMS, cx),
        Verb::Launch(args) => return ranks::start(&args, cx),
        Verb::Cluster { verb } => ranks::execute(&verb, cx),
        Verb::Completions { shell } => commands::completions(shell, cx),
    }
    .map(|()| ExitCode::SUCCESS)
}

/// Prints an error and gives its exit code.
fn fail(error: &Error, cx: &Context) -> ExitCode {
    if error.kind() == ErrorKind::Interrupted && !cx.interrupted() {
        return ExitCode::SUCCESS; // the reader of our output has seen enough
    }
    eprintln!("error: {error}");
    if let Some(hint) = error.hint_text() {
        eprintln!("hint: {hint}");
    }
    ExitCode::from(error.exit_code())
}

fn report_panic(info: &PanicHookInfo<'_>) {
    let what = info.payload_as_str().unwrap_or("unknown cause");
    let place = info.location().map(|l| format!(" ({}:{})", l.file(), l.line())).unwrap_or_default();
    eprintln!("error: internal error: {what}{place}");
    eprintln!("hint: this is a fault in Kiln; please report it with the command that led to it");
}
