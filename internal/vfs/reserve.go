package vfs

import (
	"errors"
	"path"
	"sync"
	"syscall"

	"firn.io/firn/internal/block"
)

// ReserveName is the file in a disk's folder that holds a Reserve.
const ReserveName = "reserve"

const (
	// reserveSteps is in how many steps a reserve is drawn on.
	reserveSteps = 8
	// reserveFloor is how many of them are left to the next start.
	reserveFloor = 2
)

// Reserve is room of a file system that is held back, as a file, for what must be
// written when others have filled the rest. It is drawn on in steps, and made
// up for when there is room again. Methods may be called by many goroutines.
type Reserve struct {
	fs   FS
	name string
	size int64 // bytes, when it is whole

	mu      sync.Mutex
	held    int64 // bytes
	drawn   bool  // it was whole before
	serving bool  // those who find no room wait for it
	ended   bool
	waiting int
	again   chan struct{} // closed and replaced when those who wait are to try again
	stuck   chan struct{} // closed while somebody waits; replaced after
}

// OpenReserve returns the reserve of so many bytes in dir, as far as it is there.
// Fill makes it whole.
func OpenReserve(fs FS, dir string, size int64) (*Reserve, error) {
	r := &Reserve{fs: fs, name: path.Join(dir, ReserveName), size: max(size, reserveSteps), again: make(chan struct{}), stuck: make(chan struct{})}
	info, err := fs.Stat(r.name)
	switch {
	case err == nil:
		r.held, r.drawn = min(info.Size, r.size), info.Size < r.size
	case block.KindOf(err) != block.NotFound:
		return nil, err
	}
	return r, nil
}

// Held is how many bytes are held back now.
func (r *Reserve) Held() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.held
}

// Fill makes up for what was drawn, if the file system has that much room and as
// much again. Kind NoSpace if it has not. It blocks.
func (r *Reserve) Fill() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	missing := r.size - r.held
	if missing <= 0 {
		return nil
	}
	sp, err := r.fs.Space(path.Dir(r.name))
	if err != nil {
		return err
	}
	if sp.FreeBytes < 2*missing {
		return block.Errorf(block.NoSpace, "%s: %d bytes are free, %d are to be held back", r.name, sp.FreeBytes, missing)
	}
	f, err := r.fs.Open(r.name, Create, ClassOther)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Allocate(0, r.size); err != nil {
		return err
	}
	r.held, r.drawn = r.size, false
	return nil
}

// draw gives a step of the reserve back to the file system, while more than floor
// of them are left.
func (r *Reserve) draw(floor int64) bool {
	step := max(1, r.size/reserveSteps)
	if r.held <= floor*step {
		return false
	}
	f, err := r.fs.Open(r.name, 0, ClassOther)
	if err != nil {
		return false
	}
	defer f.Close()
	left := max(0, r.held-step)
	if f.Truncate(left) != nil {
		return false
	}
	r.held, r.drawn = left, true
	return true
}

// Do runs op, a write, and again when it found no room: part of the reserve is
// given up for it or, once Serve was called, it waits until others make room. Up to
// then, and after End, it does not wait, and returns what op does.
func (r *Reserve) Do(op func() error) error {
	err := op()
	waits := false
	for err != nil && IsNoSpace(err) && r.makeRoom(&waits) {
		err = op()
	}
	if waits {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.waiting--; r.waiting == 0 {
			r.stuck = make(chan struct{})
		}
	}
	return err
}

// IsNoSpace tells whether a file system had no room for a write, which may be tried
// again.
func IsNoSpace(err error) bool {
	return errors.Is(err, block.NoSpace) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// makeRoom tells whether to try a write again that found no room. waits says
// whether the caller is counted among those who wait.
func (r *Reserve) makeRoom(waits *bool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended {
		return false
	}
	if !r.serving {
		return r.draw(0)
	}
	if r.draw(reserveFloor) {
		return true
	}
	if !*waits {
		*waits = true
		if r.waiting++; r.waiting == 1 {
			close(r.stuck)
		}
	}
	again := r.again
	r.mu.Unlock()
	<-again
	r.mu.Lock()
	return !r.ended
}

// Release gives the whole reserve up, for a start that finds no room. It tells
// whether there was any.
func (r *Reserve) Release() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	gave := false
	for r.draw(0) {
		gave = true
	}
	return gave
}

// Serve ends the start: from here on Do leaves a part for the next one, and waits.
func (r *Reserve) Serve() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.serving = true
}

// Retry lets those who wait try again; if there are none it fills the reserve.
// It blocks, and is to be called now and then while Short.
func (r *Reserve) Retry() {
	r.mu.Lock()
	waiting := r.waiting > 0
	r.wake()
	r.mu.Unlock()
	if !waiting {
		_ = r.Fill() // or later
	}
}

func (r *Reserve) wake() {
	close(r.again)
	r.again = make(chan struct{})
}

// End lets those who wait give up, and all who come later.
func (r *Reserve) End() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = true
	r.wake()
}

// Short tells whether the file system has run full: somebody waits for room, or
// half of the reserve was given up.
func (r *Reserve) Short() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.waiting > 0 || r.drawn && r.held < r.size/2
}

// Whole tells whether all of it is held back.
func (r *Reserve) Whole() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.held == r.size
}

// Stuck tells whether somebody waits for room.
func (r *Reserve) Stuck() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.waiting > 0
}

// Waits returns a channel that is closed once somebody waits for room.
func (r *Reserve) Waits() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stuck
}
