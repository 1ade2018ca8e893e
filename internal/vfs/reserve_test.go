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
	for range 4 {
		if !r.Make() {
			t.Fatal("nothing is drawn")
		}
	}
	want(r, size/2, false)
	for range 2 {
		r.Make()
	}
	want(r, size/4, true)
	waits := r.Waits()
	answer := make(chan bool)
	ask := func() { go func() { answer <- r.Make() }() }
	ask()
	<-waits
	if !r.Stuck() {
		t.Error("nobody waits")
	}
	fs.SetCapacity(2 * size) // room for what is missing, not for as much again
	r.Retry()                // wakes who waits, and does not take the room from it
	if !<-answer {
		t.Error("who waited is to give up")
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
	r.Serve()
	waits = r.Waits()
	ask()
	<-waits
	r.End()
	if <-answer || r.Make() {
		t.Error("after the end somebody is to try again")
	}
}
