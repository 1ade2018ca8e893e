// Package clock is the only way to the time. Instants count nanoseconds on
// CLOCK_BOOTTIME, which goes on while a machine is suspended: a lease that was
// measured on a clock that stops would outlive its owner's right (rule F3).
package clock

import (
	"time"

	"golang.org/x/sys/unix"
)

// Instant is a point on the boot-time clock of this machine, in nanoseconds.
// Instants of different machines, or of different boots, are not comparable.
type Instant int64

// Add returns the instant d later.
func (t Instant) Add(d time.Duration) Instant { return t + Instant(d) }

// Sub returns the time from u to t.
func (t Instant) Sub(u Instant) time.Duration { return time.Duration(t - u) }

// Clock tells the time.
type Clock interface {
	// Now is the boot-time clock.
	Now() Instant
	// Wall is the calendar, for people and for file dates only: no decision may
	// depend on it.
	Wall() time.Time
}

// System is the machine's clock.
type System struct{}

// Now reads CLOCK_BOOTTIME.
func (System) Now() Instant {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("clock: CLOCK_BOOTTIME cannot be read: " + err.Error())
	}
	return Instant(ts.Nano())
}

// Wall reads the calendar.
func (System) Wall() time.Time { return time.Now() }
