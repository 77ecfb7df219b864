//! Reads weights ahead: while one program runs, the system fetches what the next one reads into its page cache.
//!
//! Kernels on the CPU read weights where files are mapped, uploads to a GPU copy them from there; a page that is not in
//! memory stops both until the disk has answered. A thread of its own asks for pages in the order in which programs
//! read them. It only advises the system, so that what it asks for too much costs nothing but disk time.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use memmap2::Mmap;

/// A part of a mapped file.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub map: Arc<Mmap>,
    pub start: usize,
    pub bytes: usize,
}

/// What is asked for at once: large enough for a disk, small enough to stop soon.
const PIECE_BYTES: usize = 8 << 20;

/// Asks for spans in order, on a thread of its own.
pub(crate) struct Prefetcher {
    queue: Option<Sender<Vec<Span>>>,
    thread: Option<JoinHandle<()>>,
}

impl Default for Prefetcher {
    /// Asks the system.
    fn default() -> Self {
        Prefetcher::new(|piece| will_need(&piece.map, piece.start, piece.bytes))
    }
}

impl Prefetcher {
    /// Starts the thread; without one nothing is fetched ahead.
    fn new(mut ask: impl FnMut(&Span) + Send + 'static) -> Prefetcher {
        let (queue, orders) = channel::<Vec<Span>>();
        let fetch = move || {
            while let Ok(mut order) = orders.recv() {
                let mut at = 0;
                while let Some(rest) = order.get_mut(at) {
                    // New orders replace old ones: what they say is needed sooner.
                    if let Ok(newer) = orders.try_recv() {
                        (order, at) = (newer, 0);
                        continue;
                    }
                    let piece = Span { bytes: rest.bytes.min(PIECE_BYTES), ..rest.clone() };
                    ask(&piece);
                    rest.start += piece.bytes;
                    rest.bytes -= piece.bytes;
                    at += usize::from(rest.bytes == 0);
                }
            }
        };
        let thread = std::thread::Builder::new().name("prefetch".into()).spawn(fetch).ok();
        Prefetcher { queue: thread.is_some().then_some(queue), thread }
    }

    /// Fetches the first `most_bytes` bytes of spans, instead of what is left of an earlier order.
    pub fn fetch(&self, mut spans: Vec<Span>, most_bytes: u64) {
        let mut left = most_bytes;
        for span in &mut spans {
            span.bytes = span.bytes.min(usize::try_from(left).unwrap_or(usize::MAX));
            left -= span.bytes as u64;
        }
        spans.retain(|span| span.bytes > 0);
        if let Some(queue) = &self.queue {
            // The thread lives as long as the queue.
            let _ = queue.send(spans);
        }
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        // An empty order stops the one before, the end of the queue the thread.
        self.fetch(Vec::new(), 0);
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(unix)]
fn will_need(map: &Mmap, start: usize, bytes: usize) {
    // Advice that is not taken changes nothing.
    let _ = map.advise_range(memmap2::Advice::WillNeed, start, bytes);
}

#[cfg(not(unix))]
fn will_need(_: &Mmap, _: usize, _: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped(bytes: usize) -> Arc<Mmap> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes as u64).unwrap();
        // SAFETY: nobody else has the file.
        Arc::new(unsafe { Mmap::map(&file) }.unwrap())
    }

    #[test]
    fn spans_are_asked_for_in_pieces_and_in_order() {
        let map = mapped(3 * PIECE_BYTES);
        let span = |start, bytes| Span { map: map.clone(), start, bytes };
        let (asked, pieces) = channel();
        let prefetcher = Prefetcher::new(move |piece| asked.send((piece.start, piece.bytes)).unwrap());
        prefetcher.fetch(
            vec![span(1, 2 * PIECE_BYTES + 1), span(0, 0), span(7, 9), span(0, 100)],
            2 * PIECE_BYTES as u64 + 20,
        );
        let first: Vec<_> = pieces.iter().take(5).collect();
        let second = 1 + PIECE_BYTES;
        let expected = [(1, PIECE_BYTES), (second, PIECE_BYTES), (second + PIECE_BYTES, 1), (7, 9), (0, 10)];
        assert_eq!(first, expected);
    }

    #[test]
    fn a_new_order_replaces_the_old_one() {
        let map = mapped(4 * PIECE_BYTES);
        let span = |start, bytes| Span { map: map.clone(), start, bytes };
        let (asked, pieces) = channel();
        let (go, wait) = channel::<()>();
        let prefetcher = Prefetcher::new(move |piece| {
            asked.send(piece.start).unwrap();
            // An order is open until the test has seen its piece.
            let _ = wait.recv();
        });
        prefetcher.fetch(vec![span(0, 4 * PIECE_BYTES)], u64::MAX);
        assert_eq!(pieces.recv(), Ok(0));
        prefetcher.fetch(vec![span(5, 1)], u64::MAX);
        go.send(()).unwrap();
        assert_eq!(pieces.recv(), Ok(5));
        drop(go);
        drop(prefetcher);
        assert_eq!(pieces.recv().ok(), None, "nothing is left of the old order");
        assert_eq!(Arc::strong_count(&map), 1, "the thread has ended");
    }
}
