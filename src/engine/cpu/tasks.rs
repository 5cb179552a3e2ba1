//! How tasks come to threads.

use rayon::prelude::*;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Runs `count` tasks, each with the scratch of its thread.
///
/// A thread takes runs of tasks that follow each other, so that it finds in its scratch what the task before has left there:
/// half of its share of those that remain, whole units of `unit` tasks while there are so many.
pub(super) fn in_runs<S>(
    count: usize,
    unit: usize,
    scratch: impl Fn() -> S + Sync,
    task: impl Fn(&mut S, usize) + Sync,
) {
    let threads = rayon::current_num_threads();
    let next = AtomicUsize::new(0);
    let take = || {
        let mut run = 0..0;
        let taken = next.fetch_update(Relaxed, Relaxed, |start| {
            run = run_from(start, count, unit, threads);
            (!run.is_empty()).then_some(run.end)
        });
        taken.is_ok().then_some(run)
    };
    (0..threads.min(count)).into_par_iter().with_max_len(1).for_each(|_| {
        let mut own = None;
        while let Some(run) = take() {
            let own = own.get_or_insert_with(&scratch);
            run.for_each(|index| task(own, index));
        }
    });
}

fn run_from(start: usize, count: usize, unit: usize, threads: usize) -> Range<usize> {
    let rest = count - start;
    let end = start + (rest / (2 * threads)).max(1).min(rest);
    let whole = end / unit * unit;
    start..if whole > start { whole } else { end }
}

#[cfg(test)]
mod tests {
    use super::{in_runs, run_from};
    use std::sync::Mutex;

    #[test]
    fn every_task_runs_once() {
        for (count, unit) in [(0, 1), (1, 4), (7, 1), (40, 8), (1000, 7)] {
            let seen = Mutex::new(Vec::new());
            in_runs(count, unit, || (), |(), index| seen.lock().expect("no task panics").push(index));
            let mut seen = seen.into_inner().expect("no task panics");
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..count), "{count} tasks in units of {unit}");
        }
    }

    #[test]
    fn runs_end_with_units_while_they_are_long() {
        let (mut runs, mut start) = (Vec::new(), 0);
        while start < 40 {
            let run = run_from(start, 40, 4, 2);
            runs.push(run.len());
            start = run.end;
        }
        assert_eq!(runs, [8, 8, 4, 4, 4, 3, 1, 2, 1, 1, 1, 1, 1, 1]);
    }
}
