//! `kiln compile`: loop programs into modules, and what they compute.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use kiln::compiler::Graph;
use kiln::compiler::loops::{
    Buffer, Checked, Outcome, Pass, Program, check, default_passes, interpret, read_buffers, to_wasm,
    to_wgsl, write_buffers,
};
use kiln::core::{Context, Error, Result, write_atomic};
use serde_json::json;

use crate::cli::{CompileVerb, ProgramArgs, ProgramSource, Target};
use crate::commands::{Systems, captured};

pub fn execute(verb: &CompileVerb, systems: Systems, cx: &Context) -> Result<()> {
    match verb {
        CompileVerb::Build { program: args, out } => {
            build(&prepared(args, systems, cx)?, args.target, out, cx)
        }
        CompileVerb::Run { program: args, inputs, out, max_steps } => {
            run(prepared(args, systems, cx)?, args.target, inputs, out, *max_steps, cx)
        }
    }
}

/// A program that passed the verifier, after the passes that were asked for.
struct Prepared {
    program: Program,
    checked: Checked,
    /// Inputs that are known: the parameters of a network.
    constants: BTreeMap<String, Buffer>,
}

/// Writes a program as its target has it, beside the text and the JSON of what the passes made of it.
fn build(prepared: &Prepared, target: Target, out: &Path, cx: &Context) -> Result<()> {
    let Prepared { program, checked, constants } = prepared;
    let failed = |e| Error::work("cannot write the program as JSON").caused_by(e);
    // Everything is made before anything is written.
    let mut files: Vec<(String, Vec<u8>)> = vec![
        ("program.json".into(), serde_json::to_vec_pretty(program).map_err(failed)?),
        ("program.txt".into(), program.to_string().into_bytes()),
    ];
    match target {
        Target::Interp => {}
        Target::Wasm => {
            let module = to_wasm(program, checked)?;
            let params = program.params.iter().zip(&module.offsets);
            let params: Vec<_> = params
                .map(|(param, offset)| {
                    json!({ "name": param.name, "dtype": param.dtype, "shape": param.shape, "io": param.io, "offset": offset })
                })
                .collect();
            let layout =
                json!({ "params": params, "memory": module.memory, "assertions": module.assertions });
            files.push(("module.wasm".into(), module.bytes));
            files.push(("layout.json".into(), layout.to_string().into_bytes()));
        }
        Target::Wgsl => {
            let shaders = to_wgsl(program, checked)?;
            let kernels = shaders.kernels.iter().enumerate();
            files.extend(
                kernels.map(|(number, kernel)| {
                    (format!("kernel{number}.wgsl"), kernel.text.clone().into_bytes())
                }),
            );
            files.push(("plan.json".into(), serde_json::to_vec_pretty(&shaders).map_err(failed)?));
        }
    }
    fs::create_dir_all(out).map_err(Error::io("create", out))?;
    files.iter().try_for_each(|(name, bytes)| write_atomic(&out.join(name), bytes))?;
    let mut written: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    if !constants.is_empty() {
        write_buffers(&out.join("constants.npz"), constants)?;
        written.push("constants.npz");
    }
    cx.emit(&json!({ "out": out, "files": written }), |_| {
        format!("{} in {}\n", written.join(", "), out.display())
    })
}

fn run(
    prepared: Prepared,
    target: Target,
    inputs: &Path,
    out: &Path,
    max_steps: u64,
    cx: &Context,
) -> Result<()> {
    let Prepared { program, checked, constants } = prepared;
    let mut arrays = read_buffers(inputs)?;
    arrays.extend(constants);
    let outcome: Outcome = match target {
        Target::Interp => interpret(&program, &checked, &arrays, max_steps)?,
        Target::Wasm => to_wasm(&program, &checked)?.run(&arrays)?,
        Target::Wgsl => {
            return Err(Error::usage("Kiln runs no shaders itself")
                .hint("`kiln compile build --target wgsl` writes them, with a plan, for WebGPU"));
        }
    };
    let results =
        outcome.map_err(|trap| Error::work(format!("the program \"{}\" trapped: {trap}", program.name)))?;
    write_buffers(out, &results)?;
    let names: Vec<&String> = results.keys().collect();
    cx.emit(&json!({ "out": out, "outputs": names }), |_| {
        format!("{} in {}\n", results.keys().cloned().collect::<Vec<_>>().join(", "), out.display())
    })
}

/// Reads a program or writes a network as one, verifies it and applies the passes that were asked for.
fn prepared(args: &ProgramArgs, systems: Systems, cx: &Context) -> Result<Prepared> {
    let ProgramSource { program, graph, model } = &args.source;
    let (mut program, constants) = match (program, graph, model) {
        (Some(path), ..) => (read(path)?, BTreeMap::new()),
        (None, Some(folder), _) => Graph::load(folder)?.to_loops()?,
        (None, None, Some(model)) => captured(systems, model, cx)?.to_loops()?,
        (None, None, None) => return Err(Error::usage("--program, --graph or --model is needed")),
    };
    check(&program)?;
    let passes = match args.passes.as_slice() {
        [all] if all == "default" => default_passes(),
        [none] if none == "none" => Vec::new(),
        named => named.iter().map(|pass| Pass::parse(pass)).collect::<Result<_>>()?,
    };
    passes.iter().try_for_each(|pass| pass.apply(&mut program))?;
    let checked = check(&program)?;
    Ok(Prepared { program, checked, constants })
}

fn read(path: &Path) -> Result<Program> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    if text.trim_start().starts_with('{') {
        return serde_json::from_str(&text).map_err(|e| {
            Error::input(path.display(), "is no program in the format kiln-loop-ir/1").caused_by(e)
        });
    }
    text.parse()
        .map_err(|e: Error| Error::input(path.display(), "is no program in the text form").caused_by(e))
}
