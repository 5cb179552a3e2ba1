//! Files built byte by byte, and the binary that reads them.

#![allow(dead_code, reason = "each test file uses its part")]

use half::{bf16, f16};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// One tensor of a file.
#[derive(Clone)]
pub struct Entry {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A file to be written: tensors in the order given, whatever that does to their alignment.
#[derive(Clone, Default)]
pub struct File {
    pub tensors: Vec<Entry>,
    pub metadata: Vec<(String, String)>,
}

impl File {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn with(mut self, name: &str, dtype: &'static str, shape: &[usize], bytes: Vec<u8>) -> Self {
        self.tensors.push(Entry { name: name.to_string(), dtype, shape: shape.to_vec(), bytes });
        self
    }

    pub fn f16(self, name: &str, shape: &[usize], values: &[f16]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.with(name, "F16", shape, bytes)
    }

    pub fn bf16(self, name: &str, shape: &[usize], values: &[bf16]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.with(name, "BF16", shape, bytes)
    }

    pub fn f32(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.with(name, "F32", shape, bytes)
    }

    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.metadata.push((name.to_string(), value.to_string()));
        self
    }

    /// Without one tensor.
    pub fn without(mut self, name: &str) -> Self {
        self.tensors.retain(|entry| entry.name != name);
        self
    }

    /// With one tensor's type and shape replaced, and as many bytes of zeros as they take.
    pub fn retyped(mut self, name: &str, dtype: &'static str, size: usize, shape: &[usize]) -> Self {
        let entry = self.tensors.iter_mut().find(|entry| entry.name == name).expect("the file has the tensor");
        (entry.dtype, entry.shape) = (dtype, shape.to_vec());
        entry.bytes = vec![0; size * shape.iter().product::<usize>()];
        self
    }

    pub fn header(&self) -> String {
        let mut entries = Vec::new();
        if !self.metadata.is_empty() {
            let pairs = self.metadata.iter().map(|(name, value)| (name.clone(), value.clone().into()));
            let pairs = serde_json::Value::Object(pairs.collect());
            entries.push(format!("\"__metadata__\":{pairs}"));
        }
        let mut start = 0;
        for Entry { name, dtype, shape, bytes } in &self.tensors {
            let (name, end) = (serde_json::Value::from(name.as_str()), start + bytes.len());
            entries
                .push(format!("{name}:{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}"));
            start = end;
        }
        format!("{{{}}}", entries.join(","))
    }

    pub fn data(&self) -> Vec<u8> {
        self.tensors.iter().flat_map(|entry| entry.bytes.iter().copied()).collect()
    }

    pub fn bytes(&self) -> Vec<u8> {
        join(self.header().as_bytes(), &self.data())
    }
}

/// Length, header, data.
pub fn join(header: &[u8], data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(data);
    bytes
}

/// What a command said.
pub struct Said {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Calls the binary.
pub fn call(arguments: &[&str]) -> Said {
    call_in(arguments, &[])
}

/// The same with other variables in its environment.
pub fn call_in(arguments: &[&str], environment: &[(&str, &Path)]) -> Said {
    let output = Command::new(env!("CARGO_BIN_EXE_fused-attention"))
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("the binary starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it prints UTF-8");
    let (stdout, stderr) = (text(output.stdout), text(output.stderr));
    let status = output.status.code().unwrap_or_else(|| panic!("{arguments:?}: {}: {stderr}", output.status));
    Said { status, stdout, stderr }
}

/// A folder of its own with an input in it; the second path is where the output goes.
pub struct Folder {
    folder: tempfile::TempDir,
}

impl Folder {
    pub fn new() -> Self {
        Folder { folder: tempfile::tempdir().expect("there is a folder for temporary files") }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, bytes: &[u8]) -> PathBuf {
        let path = self.path("in.safetensors");
        std::fs::write(&path, bytes).expect("the folder takes a file");
        path
    }

    /// Names of everything in it.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).expect("the folder is there");
        let mut names: Vec<String> =
            entries.map(|entry| entry.expect("it can be read").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// Numbers that differ everywhere, in [-1, 1).
pub fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Where the command line finds a CUDA driver, if its build has one and kernels for it.
pub fn stand_in_driver() -> Option<&'static Path> {
    #[cfg(feature = "emulated")]
    return fused_attention::cuda::toolkit().and_then(|_| fused_attention::emulated::stand_in_driver());
    #[cfg(not(feature = "emulated"))]
    None
}
