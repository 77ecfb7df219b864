//! Libraries that panic where a file is not as they expect: their panics become errors, and are not printed.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

static INSTALL: Once = Once::new();

thread_local! {
    /// Whether this thread is inside of [`contain`].
    static IS_CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// What `work` gives. Nothing that `work` was changing may be used after an error.
///
/// # Errors
/// The words of a panic in `work`.
pub(crate) fn contain<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    INSTALL.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !IS_CONTAINED.get() {
                previous(info);
            }
        }));
    });
    let before = IS_CONTAINED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    IS_CONTAINED.set(before);
    result.map_err(|panic| {
        let words = panic.downcast_ref::<&str>().copied();
        words.or(panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic without words").to_string()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_become_their_words() {
        assert_eq!(contain(|| 3), Ok(3));
        let count = Vec::<u32>::new().len();
        assert_eq!(contain(|| assert!(count > 0, "{count} of them")), Err("0 of them".into()));
        assert_eq!(contain(|| assert!(count > 0, "none")), Err("none".into()));
        // Inside of each other, too.
        assert_eq!(contain(|| contain(|| assert!(count > 0, "none")).is_err()), Ok(true));
    }
}
