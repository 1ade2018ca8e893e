package seglog

import (
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
	"firn.io/firn/internal/vfs"
)

// What the log does when nobody writes: it keeps spare segments, zeroes them
// ahead (a sync of a zeroed file takes two thirds of the time of one that is
// only allocated), and gives back the files of segments that it does not need.
const (
	idleAfter   = 50 * time.Millisecond
	zeroPiece   = 1 << 20
	spareFiles  = 3 // the reserve of new data, and the next segment
	surplusFree = 4 // free files kept beside a quarter of those in use
)

type idler struct {
	timer   loop.Timer
	touched bool // something was written since the timer was set
	running bool // work is in flight
	zeroes  []byte
}

// rest looks for idle work after a pause, and for missing spares at once.
func (l *Log) rest() {
	if l.idle.timer == nil && l.err == nil && l.w.closing == nil {
		l.idle.touched = false
		l.idle.timer = l.loop.After(idleAfter, func() {
			l.idle.timer = nil
			if l.idle.touched {
				l.rest()
				return
			}
			l.idleWork()
		})
	}
	if !l.idle.running && l.err == nil && l.w.closing == nil {
		if ready, possible := l.usable(); ready < spareFiles && possible > ready {
			l.makeSpare()
		}
	}
}

func (l *Log) idleWork() {
	if l.idle.running || l.err != nil || l.w.closing != nil || l.w.busy {
		return
	}
	ready, possible := l.usable()
	used := 0
	var zero *segment
	for _, s := range l.segs {
		switch {
		case s.state == free && s.fresh && s.zeroed < l.sb.SegmentBytes && !s.busy:
			zero = s
		case s.state == open || s.state == sealed:
			used++
		}
	}
	switch {
	case ready < spareFiles && possible > ready:
		l.makeSpare()
	case zero != nil:
		l.zeroAhead(zero)
	case ready > surplusFree+used/4:
		l.giveBack()
	}
}

// idleDo runs one piece of idle work. The next follows at once while nobody writes.
func (l *Log) idleDo(work func() error, done func(error)) {
	l.idle.running = true
	var err error
	l.loop.Do(loop.Merge, func() { err = work() }, func() {
		l.idle.running = false
		done(err)
		if l.w.closing != nil || l.w.stalled {
			l.pumpLater()
		}
		if !l.idle.touched {
			l.idleWork()
		}
		l.rest()
	})
}

// makeSpare makes the file of one more segment.
func (l *Log) makeSpare() {
	s := l.vacant()
	if s == nil || l.space.full {
		return
	}
	l.setState(s, making)
	var f vfs.File
	l.idleDo(func() (err error) {
		f, err = l.makeFile(s.id)
		return err
	}, func(err error) {
		switch {
		case err == nil:
			l.setFile(s, f)
			l.setState(s, free)
		case block.KindOf(err) == block.NoSpace:
			l.setState(s, missing)
			l.refusedFile()
		default:
			l.setState(s, missing)
			l.fail(err)
		}
	})
}

// zeroAhead zeroes the next piece of a spare.
func (l *Log) zeroAhead(s *segment) {
	s.busy = true
	if l.idle.zeroes == nil {
		l.idle.zeroes = payload.New(zeroPiece).Bytes()
		clear(l.idle.zeroes)
	}
	zeroes, f, off := l.idle.zeroes, s.file, s.zeroed
	n := min(zeroPiece, l.sb.SegmentBytes-off)
	l.idleDo(func() error {
		if _, err := f.WriteAt(zeroes[:n], off); err != nil {
			return err
		}
		return f.Sync()
	}, func(err error) {
		s.busy = false
		if err != nil {
			l.fail(err)
			return
		}
		s.zeroed += n
		l.stats.ZeroedBytes += uint64(n)
	})
}

// giveBack removes the file of a free segment, the last one.
func (l *Log) giveBack() {
	var s *segment
	for _, x := range l.segs {
		if x.state == free && !x.busy {
			s = x
		}
	}
	if s == nil {
		return
	}
	f := s.file
	l.mu.Lock()
	l.setState(s, making)
	s.file, s.generation, s.zeroed, s.fresh = nil, 0, 0, false
	l.mu.Unlock()
	l.idleDo(func() error {
		f.Close()
		return l.fs.Remove(segmentName(l.dir, s.id))
	}, func(err error) {
		l.setState(s, missing)
		l.space.full = false
		if err != nil {
			l.logf("segment %d of disk %v cannot be removed: %v", s.id, l.sb.Disk, err)
		}
	})
}
