package vfs_test

import (
	"errors"
	"testing"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/vfs"
)

func TestReserve(t *testing.T) {
	t.Parallel()
	const size = 1 << 20
	fs := vfs.NewSim(4 * size)
	if err := fs.MkdirAll("/disk"); err != nil {
		t.Fatal(err)
	}
	open := func() *vfs.Reserve {
		t.Helper()
		r, err := vfs.OpenReserve(fs, "/disk", size)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	want := func(r *vfs.Reserve, held int64, short bool) {
		t.Helper()
		if r.Held() != held || r.Short() != short {
			t.Fatalf("%d bytes are held, short %v; want %d, %v", r.Held(), r.Short(), held, short)
		}
	}
	r := open()
	want(r, 0, false)
	if err := r.Fill(); err != nil {
		t.Fatal(err)
	}
	want(r, size, false)
	r = open()
	want(r, size, false)

	// While it serves, a part is left to the next start.
	r.Serve()
	full := block.Errorf(block.NoSpace, "full")
	times := func(n int) func() error { // a write that finds room the n-th time
		return func() error {
			if n--; n > 0 {
				return full
			}
			return nil
		}
	}
	if err := r.Do(times(5)); err != nil {
		t.Fatal(err)
	}
	want(r, size/2, false)
	if err := r.Do(times(3)); err != nil {
		t.Fatal(err)
	}
	want(r, size/4, true)
	other := errors.New("another error")
	if err := r.Do(func() error { return other }); err != other {
		t.Fatal(err)
	}
	answer := make(chan error)
	waits := r.Waits()
	go func() { answer <- r.Do(times(2)) }()
	<-waits
	if !r.Stuck() {
		t.Error("nobody waits")
	}
	fs.SetCapacity(2 * size) // room for what is missing, not for as much again
	r.Retry()                // wakes who waits, and does not take the room from it
	if err := <-answer; err != nil || r.Stuck() {
		t.Errorf("who waited gave up: %v", err)
	}
	want(r, size/4, true)
	if err := r.Fill(); err != nil {
		t.Fatal(err)
	}
	want(r, size, false)
	fs.SetCapacity(size)
	if r = open(); !r.Release() || r.Release() {
		t.Error("a start does not get all of it, once")
	}
	if err := r.Fill(); !errors.Is(err, block.NoSpace) {
		t.Errorf("the last room is taken: %v", err)
	}
	if err := r.Do(times(2)); err != full {
		t.Errorf("a start waits for room: %v", err)
	}
	r.Serve()
	waits = r.Waits()
	go func() { answer <- r.Do(func() error { return full }) }()
	<-waits
	r.End()
	if err := <-answer; err != full {
		t.Errorf("after the end somebody waits: %v", err)
	}
	if err := r.Do(times(2)); err != full {
		t.Errorf("after the end: %v", err)
	}
}
