package scsi

import (
	"bytes"
	"context"
	"encoding/binary"
	"testing"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/block/blocktest"
)

const testBytes = 1 << 20

func unit(t testing.TB, store Store) (*Unit, *blocktest.Device) {
	t.Helper()
	dev := blocktest.New(blocktest.Options{Bytes: testBytes, Name: "vol", ID: block.VolumeID{1, 2, 3}})
	u, err := NewUnit(context.Background(), Config{Device: dev, Store: store})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(u.Close)
	return u, dev
}

// nexus attaches a nexus whose first attention is taken.
func nexus(u *Unit, name string) *Nexus {
	n := &Nexus{Initiator: PortName("iqn.test:"+name, [6]byte{1}), Port: 1, Group: 1, TargetName: "iqn.t", Tag: 1}
	u.Attach(n, AttentionPowerOn)
	u.takeAttention(n)
	return n
}

func do(u *Unit, n *Nexus, cdb []byte, out []byte) Result {
	return u.Do(context.Background(), n, Request{CDB: cdb, Out: out, Offered: int64(len(out)), Limit: 1 << 20})
}

func cdb10(op byte, lba uint32, blocks uint16) []byte {
	c := make([]byte, 10)
	c[0] = op
	binary.BigEndian.PutUint32(c[2:], lba)
	binary.BigEndian.PutUint16(c[7:], blocks)
	return c
}

// expect checks status, and for CHECK CONDITION key and code of fixed sense data.
func expect(t *testing.T, what string, r Result, status Status, key byte, code Code) {
	t.Helper()
	if r.Status != status {
		t.Errorf("%s: status %#x, want %#x (sense % x)", what, r.Status, status, r.Sense)
		return
	}
	if status == CheckCondition && (r.Sense[2] != key || be16(r.Sense[12:]) != uint16(code)) {
		t.Errorf("%s: sense % x, want key %x code %04x", what, r.Sense, key, code)
	}
}

func TestReadWrite(t *testing.T) {
	u, dev := unit(t, nil)
	n := nexus(u, "a")
	p := bytes.Repeat([]byte{7}, 1024)
	expect(t, "write", do(u, n, cdb10(opWrite10, 4, 2), p), Good, 0, 0)
	got := make([]byte, 1024)
	if err := dev.ReadAt(t.Context(), got, 2048); err != nil || !bytes.Equal(got, p) {
		t.Errorf("the device holds %x..., %v", got[:4], err)
	}
	r := do(u, n, cdb10(opRead10, 4, 2), nil)
	if !bytes.Equal(r.In, p) || r.Wanted != 1024 {
		t.Errorf("%d bytes of %d", len(r.In), r.Wanted)
	}
	last := uint32(testBytes/512 - 1)
	expect(t, "last block", do(u, n, cdb10(opRead10, last, 1), nil), Good, 0, 0)
	expect(t, "over the end", do(u, n, cdb10(opRead10, last, 2), nil), CheckCondition, keyIllegal, ascLBAOutOfRange)
	expect(t, "protection", do(u, n, func() []byte { c := cdb10(opRead10, 0, 1); c[1] = 0x20; return c }(), nil), CheckCondition, keyIllegal, ascInvalidFieldCDB)
	expect(t, "unknown", do(u, n, make10(0xff), nil), CheckCondition, keyIllegal, ascInvalidOpcode)
}

func make10(op byte) []byte { return append([]byte{op}, make([]byte, 9)...) }

func TestAttentions(t *testing.T) {
	u, dev := unit(t, nil)
	a, b := nexus(u, "a"), nexus(u, "b")
	if !u.clean.Load() {
		t.Error("nothing waits, and yet the fast path is off")
	}
	dev.Resize(2 * testBytes)
	if u.clean.Load() {
		t.Error("a resize waits, and yet the fast path is on")
	}
	for _, n := range []*Nexus{a, b} {
		// INQUIRY passes by what waits; the next one is told, once.
		expect(t, "inquiry", do(u, n, []byte{opInquiry, 0, 0, 0, 96, 0}, nil), Good, 0, 0)
		expect(t, "resize", do(u, n, cdb10(opRead10, 0, 1), nil), CheckCondition, keyAttention, attentionCapacity)
		expect(t, "after", do(u, n, cdb10(opRead10, 0, 1), nil), Good, 0, 0)
	}
	r := do(u, a, cdb10(opReadCapacity10, 0, 0), nil)
	if got := be32(r.In); got != 2*testBytes/512-1 {
		t.Errorf("last block is %d", got)
	}
}

func prOut(action, kind byte, key, serviceKey uint64) ([]byte, []byte) {
	c := make10(opPersistentOut)
	c[1], c[2], c[8] = action, kind, 24
	p := make([]byte, 24)
	binary.BigEndian.PutUint64(p, key)
	binary.BigEndian.PutUint64(p[8:], serviceKey)
	return c, p
}

// TestReservationsOutliveTheUnit loads what another unit saved, as after a
// restart or at another gateway.
func TestReservationsOutliveTheUnit(t *testing.T) {
	store := &MemoryStore{}
	u, _ := unit(t, store)
	a, b := nexus(u, "a"), nexus(u, "b")
	run := func(u *Unit, n *Nexus, action, kind byte, key, serviceKey uint64) Result {
		c, p := prOut(action, kind, key, serviceKey)
		return do(u, n, c, p)
	}
	expect(t, "register", run(u, a, prRegister, 0, 0, 11), Good, 0, 0)
	expect(t, "reserve", run(u, a, prReserve, typeExclusive, 11, 0), Good, 0, 0)
	expect(t, "write of another", do(u, b, cdb10(opWrite10, 0, 1), make([]byte, 512)), ReservationConflict, 0, 0)

	u2, _ := unit(t, store)
	a2, b2 := nexus(u2, "a"), nexus(u2, "b")
	expect(t, "write of another, later", do(u2, b2, cdb10(opWrite10, 0, 1), make([]byte, 512)), ReservationConflict, 0, 0)
	expect(t, "write of the holder, later", do(u2, a2, cdb10(opWrite10, 0, 1), make([]byte, 512)), Good, 0, 0)
	expect(t, "preempt", run(u2, b2, prRegister, 0, 0, 22), Good, 0, 0)
	expect(t, "preempt", run(u2, b2, prPreempt, typeExclusive, 22, 11), Good, 0, 0)
	expect(t, "the preempted is told", do(u2, a2, cdb10(opRead10, 0, 1), nil), CheckCondition, keyAttention, attentionPreempted)
	expect(t, "and kept out", do(u2, a2, cdb10(opRead10, 0, 1), nil), ReservationConflict, 0, 0)

	// The first gateway finds that the state has moved on, and judges anew.
	expect(t, "an old holder's release", run(u, a, prRelease, typeExclusive, 11, 0), ReservationConflict, 0, 0)
	expect(t, "an old holder's clear", run(u, a, prClear, 0, 11, 0), ReservationConflict, 0, 0)
}

func TestLUNs(t *testing.T) {
	for _, lun := range []uint16{0, 1, 255, 256, MaxLUN} {
		if got, ok := DecodeLUN(EncodeLUN(lun)); !ok || got != lun {
			t.Errorf("%d becomes %d, %v", lun, got, ok)
		}
	}
	if _, ok := DecodeLUN(1); ok {
		t.Error("a LUN of a deeper level is taken")
	}
}

// FuzzCommand runs any CDB with any data: no panic, no data beyond the limit,
// and sense data exactly with CHECK CONDITION.
func FuzzCommand(f *testing.F) {
	for _, c := range commands {
		cdb := make([]byte, 16)
		cdb[0] = c.opcode
		if c.action >= 0 {
			cdb[1] = byte(c.action)
		}
		f.Add(cdb, make([]byte, 64), uint16(96))
		for i := 2; i < 15; i++ {
			cdb[i] = 1
		}
		f.Add(append([]byte(nil), cdb...), make([]byte, 1024), uint16(512))
	}
	u, _ := unit(f, nil)
	n := nexus(u, "a")
	f.Fuzz(func(t *testing.T, cdb, out []byte, limit uint16) {
		if n := u.DataOut(cdb); n < 0 || n > MaxTransferBytes {
			t.Fatalf("%d bytes of data are wanted", n)
		}
		if n := u.DataIn(cdb); n < 0 || n > MaxTransferBytes {
			t.Fatalf("%d bytes of data are read", n)
		}
		if loan, ok := u.Memory(cdb); ok {
			loan.Release()
		}
		r := u.Do(t.Context(), n, Request{CDB: cdb, Out: out, Offered: int64(len(out)), Limit: int64(limit)})
		if len(r.In) > int(limit) || (len(r.Sense) > 0) != (r.Status == CheckCondition) || len(r.Sense) > SenseLen {
			t.Fatalf("% x: %d bytes of %d, status %x, sense % x", cdb, len(r.In), limit, r.Status, r.Sense)
		}
		NoUnit(cdb, []uint16{0, 300}, int64(limit))
	})
}

// FuzzReservations decodes what a store may hold.
func FuzzReservations(f *testing.F) {
	f.Add([]byte(`{"format":1,"generation":3,"registrations":[{"initiator":"a","port":1,"key":5}],"type":3,"holder":{"initiator":"a","port":1}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := decodeState(text)
		if err == nil && len(s.Registrations) > maxRegistrations {
			t.Errorf("%d registrations", len(s.Registrations))
		}
	})
}
