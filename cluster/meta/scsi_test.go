package meta_test

import (
	"testing"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
)

func TestReservationsAreComparedAndSet(t *testing.T) {
	f := newFixture(t, 1)
	v := f.create("vol")
	text, at, err := meta.Reservations(ctx, f.s, v.ID)
	f.ok(err)
	if len(text) != 0 || at != 0 {
		t.Fatalf("%q at %d", text, at)
	}
	first, err := meta.PutReservations(ctx, f.s, v.ID, []byte("one"), at)
	f.ok(err)
	_, err = meta.PutReservations(ctx, f.s, v.ID, []byte("other"), at)
	f.want(err, block.Busy, "changed")
	text, at, err = meta.Reservations(ctx, f.s, v.ID)
	f.ok(err)
	if string(text) != "one" || at != first {
		t.Errorf("%q at %d, want revision %d", text, at, first)
	}
	_, err = meta.PutReservations(ctx, f.s, f.id(), []byte("x"), 0)
	f.want(err, block.NotFound, "gone")
}
