package seglog

import (
	"testing"
	"time"
)

// TestHardStateOnFullDisk: a replica votes while all segments are full and another
// one's entries wait; one whose own entries wait does not say anything of what
// comes after them (L5). What was answered outlives a crash, again and again.
func TestHardStateOnFullDisk(t *testing.T) {
	t.Parallel()
	g := newRig(t, 3, minSegmentBytes, 12)
	g.open()
	a, b := ReplicaKey{1, 1}, ReplicaKey{2, 1}
	g.create(a)
	g.create(b)
	g.run(time.Millisecond)
	for i := range uint64(100) {
		g.append(a, 11+10*i, 5, 10)
		g.run(time.Millisecond)
	}
	if !g.log.Stalled() {
		t.Fatal("the script must fill the disk")
	}
	for term := uint64(6); term < 40; term++ {
		acked := g.reps[b].acked
		g.write(b, Write{HardState: &HardState{Term: term, Vote: term, Commit: 10}})
		g.run(10 * time.Millisecond)
		if g.reps[b].acked != acked+1 {
			t.Fatalf("the vote in term %d is not answered on a full disk", term)
		}
	}
	acked := g.reps[a].acked
	g.write(a, Write{HardState: &HardState{Term: 6, Vote: 1, Commit: 500}})
	g.run(100 * time.Millisecond)
	if g.reps[a].acked != acked {
		t.Fatal("a hard state overtook entries of its own replica")
	}
	g.loop.Kill()
	g.open() // checks what was answered
	if got := g.log.Replica(b).HardState(); got.Term != 39 || got.Vote != 39 {
		t.Errorf("the vote came back as %+v", got)
	}
	g.apply(a)
	g.checkpoint()
	g.truncate(a, 0)
	g.run(time.Second)
	g.append(b, 11, 40, 3)
	g.run(time.Second)
	if g.log.Stalled() {
		t.Error("the disk is still full after a truncation")
	}
	g.verify()
}
