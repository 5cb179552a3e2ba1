//! The kernels as a GPU loads them: each row of device code, compiled by nvcc for each target, deflated and embedded.
//!
//! A row becomes PTX once, for the architecture that the table names, and machine code for each target from that:
//! written for a later architecture the PTX differs in the name of that one alone, and compiling it takes as long as
//! ptxas does. What nvcc writes is kept beside cargo's other products, under a name made of everything it depends on:
//! builds of other profiles and features find it there, and a changed header compiles anew the kernels that include
//! it and no others.

use super::instances::{INSTANCES, Instance};
use super::nvcc::{self, Nvcc};
use super::target::{Form, Target};
use super::translation_unit::translation_unit;
use super::write;
use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fmt::Write;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::Instant;

/// A list of targets, `sm_80,compute_80,sm_90a`.
const ARCHITECTURES: &str = "FUSED_ATTENTION_ARCHS";
/// What other crates' builds read: the compute capability of the one GPU to build for.
const CAPABILITY: &str = "CUDA_COMPUTE_CAP";
/// 1 makes it an error if there is no compiler.
const REQUIRE: &str = "FUSED_ATTENTION_REQUIRE_KERNELS";
/// 1 keeps source lines in the machine code, for profilers; it is then three times as large.
const LINEINFO: &str = "FUSED_ATTENTION_LINEINFO";

/// A100 and what came after it, as PTX also what is still to come; H100 and H200 on their own.
const DEFAULT_TARGETS: &str = "sm_80,compute_80,sm_90a";

/// Compiles the kernels and writes the two tables that src/ includes. `Err` is what to tell the user.
pub fn build(workspace: &Path, out: &Path) -> Result<(), String> {
    for variable in nvcc::VARIABLES.into_iter().chain([ARCHITECTURES, CAPABILITY, REQUIRE, LINEINFO]) {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let wanted = env::var_os("CARGO_FEATURE_CUDA").is_some() && env::var_os("DOCS_RS").is_none();
    let nvcc = if wanted { find(workspace)? } else { None };
    let Some(nvcc) = nvcc else {
        write(&out.join("toolkit.rs"), "None");
        write(&out.join("images.rs"), "&[]");
        write(&out.join("images.list"), "");
        write(&out.join("specific_ptx.rs"), "&[]");
        return Ok(());
    };
    let targets = targets()?;
    let images = Images::new(workspace, out, nvcc)?;
    let jobs: Vec<Job> = INSTANCES.iter().filter_map(|row| Job::new(row, &targets)).collect();
    let start = Instant::now();
    let mut arms = images.compile(&jobs)?;
    arms.sort();
    // For the tests: where PTX, machine code and what ptxas says of it are, and how long compiling took.
    let mut list = format!("{:.1} s\n", start.elapsed().as_secs_f64());
    for Arm { symbol, target, ptx, deflated } in &arms {
        let _ = writeln!(list, "{symbol}\t{target}\t{}\t{}", ptx.display(), deflated.with_extension("").display());
    }
    write(&out.join("images.list"), &list);

    // For the emulator, which interprets what no other GPU could load.
    let mut specific = String::from("&[\n");
    let is_specific = |symbol: &str| {
        INSTANCES.iter().any(|row| row.symbol() == symbol && row.device.as_ref().is_some_and(|code| code.specific))
    };
    for Arm { symbol, ptx, .. } in arms.iter().filter(|arm| is_specific(&arm.symbol)) {
        let _ = writeln!(specific, "    ({symbol:?}, include_str!({:?})),", ptx.display().to_string());
    }
    write(&out.join("specific_ptx.rs"), &(specific + "]\n"));

    let (major, minor) = images.nvcc.version;
    let literal = |target: &Target| format!("Target::new({:?}, {})", target.capability, target.form as usize);
    let listed: Vec<String> = targets.iter().map(literal).collect();
    let toolkit = format!("Some(Toolkit {{ version: ({major}, {minor}), targets: &[{}] }})", listed.join(", "));
    write(&out.join("toolkit.rs"), &toolkit);
    let mut table = String::from("&[\n");
    for Arm { symbol, target, deflated, .. } in arms {
        let target = Target::parse(&target).map(|target| literal(&target)).unwrap_or_default();
        let _ = writeln!(
            table,
            "    Image {{ symbol: {symbol:?}, target: {target}, deflated: include_bytes!({:?}) }},",
            deflated.display().to_string()
        );
    }
    write(&out.join("images.rs"), &(table + "]\n"));
    Ok(())
}

/// The compiler, or `None` if it is missing and may be.
fn find(workspace: &Path) -> Result<Option<Nvcc>, String> {
    let unfit = match Nvcc::find(workspace) {
        Ok(nvcc) => return Ok(Some(nvcc)),
        Err(unfit) => unfit.join("; "),
    };
    if env::var_os(REQUIRE).is_some_and(|value| value != "0" && !value.is_empty()) {
        let unfit = if unfit.is_empty() { "there is none".to_string() } else { unfit };
        return Err(format!(
            "{REQUIRE} is set, and no nvcc will do: {unfit}; install the CUDA toolkit, run scripts/get-nvcc, or set \
             NVCC or CUDA_HOME"
        ));
    }
    if !unfit.is_empty() {
        println!("cargo::warning=built without CUDA kernels: {unfit}");
    }
    Ok(None)
}

/// FUSED_ATTENTION_ARCHS, else CUDA_COMPUTE_CAP, else the default.
fn targets() -> Result<Vec<Target>, String> {
    let set = [ARCHITECTURES, CAPABILITY].into_iter().find_map(|variable| Some((variable, env::var(variable).ok()?)));
    let (variable, list) = set.unwrap_or(("the default", DEFAULT_TARGETS.to_string()));
    let words = list.split([',', ';', ' ']).filter(|word| !word.is_empty());
    let mut targets = Vec::new();
    for word in words {
        let Some(target) = Target::parse(word) else {
            return Err(format!("{variable} has {word:?}; list architectures as sm_80, sm_90a or compute_80 (PTX)"));
        };
        // Device code of 9.0 uses what it alone has, and a bare 90 means that GPU.
        let specific = target.form == Form::MachineCode && target.capability == (9, 0);
        let target = Target { form: if specific { Form::Specific } else { target.form }, ..target };
        if !targets.contains(&target) {
            targets.push(target);
        }
    }
    if targets.is_empty() {
        return Err(format!("{variable} lists no architecture; give it at least one, or unset it"));
    }
    Ok(targets)
}

/// Where things are while they are compiled.
struct Images {
    nvcc: Nvcc,
    /// Sources of device code.
    kernels: PathBuf,
    /// Generated sources.
    generated: PathBuf,
    /// What was compiled before.
    kept: PathBuf,
    flags: Vec<&'static str>,
}

/// A row and what it is compiled for.
struct Job {
    row: &'static Instance,
    /// Of its PTX: `compute_80`, `compute_90a`.
    architecture: String,
    targets: Vec<Target>,
}

impl Job {
    /// Nothing for a row of the host's, or that no target takes.
    fn new(row: &'static Instance, targets: &[Target]) -> Option<Job> {
        let code = row.device.as_ref()?;
        let form = if code.specific { Form::Specific } else { Form::Ptx };
        let oldest = Target { capability: code.compute_capability, form };
        let takes = |target: &Target| target.takes(code.compute_capability, code.specific);
        let targets: Vec<Target> = targets.iter().copied().filter(takes).collect();
        (!targets.is_empty()).then(|| Job { row, architecture: oldest.virtual_architecture(), targets })
    }
}

/// The image of a row for a target.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Arm {
    symbol: String,
    target: String,
    ptx: PathBuf,
    deflated: PathBuf,
}

impl Images {
    fn new(workspace: &Path, out: &Path, nvcc: Nvcc) -> Result<Self, String> {
        // OUT_DIR is TARGET/PROFILE/build/PACKAGE/out. Where cargo lays it out otherwise, every build has its own.
        let beside =
            out.ancestors().find(|folder| folder.ends_with("build")).and_then(|build| build.parent()?.parent());
        let kept = beside.unwrap_or(out).join("fused-attention-kernels");
        fs::create_dir_all(&kept).map_err(|error| format!("{}: {error}", kept.display()))?;
        let lineinfo = env::var_os(LINEINFO).is_some_and(|value| value != "0" && !value.is_empty());
        let flags = if lineinfo { vec!["-lineinfo"] } else { Vec::new() };
        Ok(Images { nvcc, kernels: workspace.join("kernels"), generated: out.to_path_buf(), kept, flags })
    }

    /// As many at once as cargo lends tokens for: one comes with this process, every other worker starts when it has
    /// its own. Nobody waits for one when no work is left: the rest of the build may have them all for minutes.
    fn compile(&self, jobs: &[Job]) -> Result<Vec<Arm>, String> {
        // SAFETY: the first thing that this process does with file descriptors it inherited.
        let lent = unsafe { jobserver::Client::from_env() };
        let workers = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize).min(jobs.len());
        let (next, arms, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()), Mutex::new(Vec::new()));
        let work = || {
            while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                match self.images(job) {
                    Ok(row) => arms.lock().expect("no worker panics").extend(row),
                    Err(failure) => failures.lock().expect("no worker panics").push(failure),
                }
            }
        };
        let work = &work;
        std::thread::scope(|scope| {
            let (sender, tokens) = mpsc::channel();
            let helper = lent.and_then(|lent| lent.into_helper_thread(move |token| drop(sender.send(token))).ok());
            (1..workers).for_each(|_| helper.iter().for_each(jobserver::HelperThread::request_token));
            scope.spawn(move || {
                for token in tokens.into_iter().flatten() {
                    scope.spawn(move || {
                        work();
                        drop(token);
                    });
                }
            });
            work();
            // And with it the channel.
            drop(helper);
        });
        let failures = failures.into_inner().expect("no worker panics");
        if failures.is_empty() { Ok(arms.into_inner().expect("no worker panics")) } else { Err(failures.join("\n")) }
    }

    /// One row for each of its targets: taken from what is kept, or compiled.
    fn images(&self, job: &Job) -> Result<Vec<Arm>, String> {
        let (symbol, unit) = (job.row.symbol(), translation_unit(job.row).unwrap_or_default());
        let key = self.key(&unit, &job.architecture)?;
        let file = |form: &str, ending: &str| self.kept.join(format!("{symbol}-{form}-{key:016x}.{ending}"));
        // Each kept last of what it is made of, so that what is there is whole.
        let ptx = file(&job.architecture, "ptx");
        if !ptx.is_file() {
            let source = self.generated.join(format!("{symbol}.cu"));
            write(&source, &unit);
            let includes = [self.kernels.as_path(), self.generated.as_path()];
            self.run(self.nvcc.ptx(&job.architecture, &includes, &source, &part(&ptx)).args(&self.flags))?;
            keep(&ptx)?;
        }
        let mut arms = Vec::new();
        for target in &job.targets {
            let name = target.to_string();
            let (deflated, cubin) = (file(&name, "z"), file(&name, "cubin"));
            if !deflated.is_file() {
                let image = if target.form == Form::Ptx {
                    // The driver wants text that ends with a zero byte.
                    let mut text = fs::read(&ptx).map_err(|error| format!("{}: {error}", ptx.display()))?;
                    text.push(0);
                    text
                } else {
                    let said = self.run(self.nvcc.cubin(&name, &ptx, &part(&cubin)).args(&self.flags))?;
                    keep(&cubin)?;
                    write(&file(&name, "log"), &said);
                    fs::read(&cubin).map_err(|error| format!("{}: {error}", cubin.display()))?
                };
                let bytes = miniz_oxide::deflate::compress_to_vec(&image, 6);
                fs::write(part(&deflated), bytes).map_err(|error| format!("{}: {error}", deflated.display()))?;
                keep(&deflated)?;
            }
            arms.push(Arm { symbol: symbol.clone(), target: name, ptx: ptx.clone(), deflated });
        }
        Ok(arms)
    }

    /// All that the images depend on, but for their targets: the compiler, how it is called, the source, and every
    /// header it includes.
    fn key(&self, unit: &str, architecture: &str) -> Result<u64, String> {
        let mut headers = BTreeMap::new();
        self.headers(unit, &self.kernels, &mut headers)?;
        let mut hasher = DefaultHasher::new();
        (&self.nvcc.described, &self.flags, architecture, unit).hash(&mut hasher);
        // By name and text: the generated one stands in another folder for each profile.
        headers.iter().map(|(path, text)| (path.file_name(), text)).collect::<BTreeSet<_>>().hash(&mut hasher);
        Ok(hasher.finish())
    }

    /// Follows `#include "…"`, from the file's own folder, then from those of the command line.
    fn headers(&self, source: &str, folder: &Path, found: &mut BTreeMap<PathBuf, String>) -> Result<(), String> {
        for line in source.lines() {
            let Some(name) = line.trim().strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"')) else {
                continue;
            };
            let folders = [folder, &self.kernels, &self.generated];
            let Some(path) = folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file()) else {
                return Err(format!("{line}: no such file below {}", self.kernels.display()));
            };
            let path = path.canonicalize().map_err(|error| format!("{}: {error}", path.display()))?;
            if !found.contains_key(&path) {
                let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
                found.insert(path.clone(), text.clone());
                self.headers(&text, path.parent().unwrap_or(folder), found)?;
            }
        }
        Ok(())
    }

    /// What the compiler said, or why it failed.
    fn run(&self, command: &mut Command) -> Result<String, String> {
        let output = command.output().map_err(|error| format!("{}: {error}", self.nvcc.path.display()))?;
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        if output.status.success() { Ok(said) } else { Err(format!("{command:?} failed:\n{said}")) }
    }
}

/// The name under which a file is written until it is whole. Two builds may write the same one at the same time.
fn part(path: &Path) -> PathBuf {
    let ending = path.extension().unwrap_or_default().to_string_lossy();
    path.with_extension(format!("{}.{ending}", std::process::id()))
}

fn keep(path: &Path) -> Result<(), String> {
    fs::rename(part(path), path).map_err(|error| format!("{}: {error}", path.display()))
}
