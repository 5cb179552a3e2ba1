//! The CUDA compiler: where it is, which version, and the two commands that compile a kernel.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Variables that name the compiler, or a toolkit's folder.
pub const VARIABLES: [&str; 4] = ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"];

/// Older ones limit a kernel's parameters to 4096 bytes.
pub const OLDEST: (u32, u32) = (12, 1);

/// A compiler that works.
pub struct Nvcc {
    pub path: PathBuf,
    pub version: (u32, u32),
    /// All that `--version` says: two compilers that say the same compile the same.
    pub described: String,
}

impl Nvcc {
    /// NVCC, then the toolkit variables, then PATH, then the usual places, then `.cuda/` in the workspace.
    ///
    /// # Errors
    /// Of each compiler found why it will not do; empty if there is none.
    pub fn find(workspace: &Path) -> Result<Nvcc, Vec<String>> {
        let [nvcc, toolkits @ ..] = VARIABLES;
        let toolkits = toolkits.iter().filter_map(env::var_os).map(|home| PathBuf::from(home).join("bin"));
        let path = env::var_os("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>()).unwrap_or_default();
        let usual = ["/usr/local/cuda/bin", "/opt/cuda/bin"].map(PathBuf::from);
        let folders = toolkits.chain(path).chain(usual).chain([workspace.join(".cuda").join("bin")]);
        let found = folders.map(|folder| folder.join(format!("nvcc{}", env::consts::EXE_SUFFIX)));
        let mut unfit = Vec::new();
        for path in env::var_os(nvcc).map(PathBuf::from).into_iter().chain(found).filter(|path| path.is_file()) {
            match Self::new(path) {
                Ok(nvcc) => return Ok(nvcc),
                Err(why) => unfit.push(why),
            }
        }
        Err(unfit)
    }

    fn new(path: PathBuf) -> Result<Nvcc, String> {
        let output = Command::new(&path).arg("--version").output();
        let output = output.map_err(|error| format!("{} does not run: {error}", path.display()))?;
        let described = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = described.split_once("release ").and_then(|(_, rest)| {
            let (major, rest) = rest.split_once('.')?;
            let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        });
        match version {
            Some(version) if version >= OLDEST => Ok(Nvcc { path, version, described }),
            Some((major, minor)) => Err(format!(
                "{} is of CUDA {major}.{minor}; the kernels need {}.{} or later",
                path.display(),
                OLDEST.0,
                OLDEST.1
            )),
            None => Err(format!("{} does not tell its version", path.display())),
        }
    }

    /// CUDA C++ to PTX.
    pub fn ptx(&self, architecture: &str, includes: &[&Path], source: &Path, ptx: &Path) -> Command {
        let mut command = Command::new(&self.path);
        command.args(["-std=c++17", "-ptx", &format!("-arch={architecture}")]);
        for folder in includes {
            command.arg("-I").arg(folder);
        }
        command.arg("-o").args([ptx, source]);
        command
    }

    /// PTX to machine code; ptxas tells what the kernel takes.
    pub fn cubin(&self, architecture: &str, ptx: &Path, cubin: &Path) -> Command {
        let mut command = Command::new(&self.path);
        command.args(["-cubin", &format!("-arch={architecture}"), "-Xptxas", "-v", "-o"]).args([cubin, ptx]);
        command
    }
}
