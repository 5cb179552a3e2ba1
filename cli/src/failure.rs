//! Why a command did nothing, and the exit status that says so.

use fused_attention::{Error, Invalid, Refusal};
use std::fmt;

/// What can end a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Arguments or a file are wrong: one line.
    Bad(String),
    /// The engine does not take the request, or failed at it: a line each for forward and backward.
    Refused(Vec<String>),
}

impl Failure {
    /// Bad input, told in one line whatever the text holds.
    pub(crate) fn bad(text: impl fmt::Display) -> Self {
        Failure::Bad(one_line(&text.to_string()))
    }

    /// Everything that is wrong, in one line; of a file with thousands of faults, as many as someone reads.
    pub(crate) fn faults(faults: &[String]) -> Self {
        const MOST: usize = 32;
        let shown = faults.iter().take(MOST).map(String::as_str).collect::<Vec<_>>().join("; ");
        match faults.len().saturating_sub(MOST) {
            0 => Failure::bad(shown),
            more => Failure::bad(format_args!("{shown}; and {more} more")),
        }
    }

    /// The same, with the file it is about.
    pub(crate) fn of_file(self, path: &std::path::Path) -> Self {
        match self {
            Failure::Bad(text) => Failure::bad(format_args!("{}: {text}", path.display())),
            refused => refused,
        }
    }

    /// The exit status.
    pub fn status(&self) -> u8 {
        match self {
            Failure::Bad(_) => 2,
            Failure::Refused(_) => 3,
        }
    }
}

impl From<Invalid> for Failure {
    fn from(invalid: Invalid) -> Self {
        Failure::bad(invalid)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Refused(refusal) => refusal.into(),
            Error::Fault { .. } | Error::Driver { .. } => Failure::Refused(vec![one_line(&error.to_string())]),
            other => Failure::bad(other),
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Failure::Refused(vec![one_line(&refusal.to_string())])
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Bad(text) => f.write_str(text),
            Failure::Refused(lines) => f.write_str(&lines.join("\n")),
        }
    }
}

/// Brings a text to one printable line: names in a file and paths may hold anything.
pub(crate) fn one_line(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

/// A name that a file gave, quoted, without control characters and not longer than a line bears.
pub(crate) fn quoted(name: &str) -> String {
    const LONGEST: usize = 60;
    match name.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{:?}…", &name[..end]),
        None => format!("{name:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_one_line_of_status_3() {
        let message = "race on shared memory\n  written at a.cuh:12\n  read at b.cuh:7".to_string();
        let failure = Failure::from(Error::Fault { kernel: "forward".into(), message });
        assert_eq!(failure.status(), 3);
        assert_eq!(
            failure.to_string(),
            "kernel forward failed: race on shared memory written at a.cuh:12 read at b.cuh:7"
        );
    }
}
