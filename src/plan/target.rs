//! What device code is compiled for, and which GPU loads it. Only the standard library, because the build script reads
//! this file too.

use std::fmt;

/// One form of the device code that a build holds, named as nvcc names it: `sm_80`, `sm_90a`, `compute_80`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Compute capability, `(8, 0)` for sm_80.
    pub capability: (u32, u32),
    /// What is stored.
    pub form: Form,
}

/// What is stored of a kernel, the least particular first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Form {
    /// Text that the driver compiles, for any GPU of this compute capability or a later one.
    Ptx,
    /// Machine code for this compute capability and the later ones of the same major version.
    MachineCode,
    /// Machine code that may use what this compute capability alone has, for nothing else.
    Specific,
}

/// The compiler of this build's device code, and what it compiled it for.
#[derive(Clone, Copy, Debug)]
pub struct Toolkit {
    /// Version of CUDA; a driver of an older major version does not load its code.
    pub version: (u32, u32),
    /// What each kernel is compiled for.
    pub targets: &'static [Target],
}

impl Form {
    const ALL: [Form; 3] = [Form::Ptx, Form::MachineCode, Form::Specific];
}

impl Target {
    /// As the build script writes it down: the form by its number.
    pub(crate) const fn new(capability: (u32, u32), form: usize) -> Target {
        Target { capability, form: Form::ALL[form] }
    }

    /// Reads `sm_80`, `sm_90a`, `compute_80`, or a bare capability: `80`, `8.0`, `90a`.
    pub fn parse(word: &str) -> Option<Target> {
        let (digits, ptx) = match (word.strip_prefix("sm_"), word.strip_prefix("compute_")) {
            (Some(digits), _) => (digits, false),
            (_, Some(digits)) => (digits, true),
            _ => (word, false),
        };
        let (digits, specific) = digits.strip_suffix('a').map_or((digits, false), |digits| (digits, true));
        let (major, minor) = match digits.split_once('.') {
            Some(parts) => parts,
            None => digits.split_at_checked(digits.len().checked_sub(1)?)?,
        };
        let number = |text: &str| (text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok())?;
        let form = match (ptx, specific) {
            (true, true) => return None,
            (true, false) => Form::Ptx,
            (false, true) => Form::Specific,
            (false, false) => Form::MachineCode,
        };
        let (major, minor): (u32, u32) = (number(major)?, number(minor)?);
        (minor < 10).then_some(Target { capability: (major, minor), form })
    }

    /// The architecture that its PTX is written for: `compute_80`, `compute_90a`.
    pub fn virtual_architecture(&self) -> String {
        let (major, minor) = self.capability;
        format!("compute_{major}{minor}{}", if self.form == Form::Specific { "a" } else { "" })
    }

    /// Whether a GPU of this compute capability loads it.
    pub fn loads_on(&self, gpu: (u32, u32)) -> bool {
        match self.form {
            Form::Ptx => self.capability <= gpu,
            Form::MachineCode => self.capability.0 == gpu.0 && self.capability.1 <= gpu.1,
            Form::Specific => self.capability == gpu,
        }
    }

    /// Whether code for this compute capability and later ones, or for it alone, can be compiled for it.
    pub fn takes(&self, capability: (u32, u32), specific: bool) -> bool {
        if specific {
            self.capability == capability && self.form == Form::Specific
        } else {
            capability <= self.capability
        }
    }

    /// Of those that load, the one that fits best: what is compiled for this GPU before what is compiled on it.
    pub fn best<'t>(targets: impl IntoIterator<Item = &'t Target>, gpu: (u32, u32)) -> Option<&'t Target> {
        let fitting = targets.into_iter().filter(|target| target.loads_on(gpu));
        fitting.max_by_key(|target| (target.form != Form::Ptx, target.capability, target.form))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.capability;
        match self.form {
            Form::Ptx => write!(f, "compute_{major}{minor}"),
            Form::MachineCode => write!(f, "sm_{major}{minor}"),
            Form::Specific => write!(f, "sm_{major}{minor}a"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Form, Target};

    #[test]
    fn names_are_read_as_nvcc_writes_them() {
        assert!(Form::ALL.iter().enumerate().all(|(number, &form)| form as usize == number));
        for name in ["sm_80", "sm_90a", "compute_80", "sm_120a", "compute_103"] {
            assert_eq!(Target::parse(name).map(|target| target.to_string()).as_deref(), Some(name));
        }
        for (bare, name) in [("80", "sm_80"), ("8.9", "sm_89"), ("90a", "sm_90a"), ("12.0", "sm_120")] {
            assert_eq!(Target::parse(bare), Target::parse(name), "{bare}");
        }
        for wrong in ["", "8", "sm_", "sm_8x", "compute_90a", "+80", "sm_8.10", "ampere", "é0"] {
            assert_eq!(Target::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_gpu_takes_what_fits_it_best() {
        let targets: Vec<Target> =
            ["sm_80", "compute_80", "sm_90a", "sm_86"].iter().filter_map(|name| Target::parse(name)).collect();
        let best = |gpu| Target::best(&targets, gpu).map(|target| target.to_string());
        assert_eq!(best((8, 0)).as_deref(), Some("sm_80"));
        assert_eq!(best((8, 9)).as_deref(), Some("sm_86"));
        assert_eq!(best((9, 0)).as_deref(), Some("sm_90a"));
        assert_eq!(best((12, 0)).as_deref(), Some("compute_80"), "only PTX is for later generations");
        assert_eq!(best((7, 5)), None);
        assert!(!Target { capability: (9, 0), form: Form::Specific }.loads_on((9, 1)));
    }
}
