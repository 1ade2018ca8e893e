package e2e

import (
	"bytes"
	"context"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"firn.io/firn/iscsi"
	"firn.io/firn/iscsi/iscsitest"
	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/wire"
)

const (
	// infoTime and enterTime are what `firn attach` waits for.
	infoTime  = 2 * time.Second
	enterTime = 15 * time.Second
)

// enterAs does what `firn attach` does to come back: it asks for the export, and
// enters it as a newer incarnation of its session.
func enterAs(t testing.TB, addr, export string, incarnation uint64) (*client.Conn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), infoTime)
	defer cancel()
	if _, err := client.Info(ctx, addr, export); err != nil {
		return nil, err
	}
	ctx, cancel = context.WithTimeout(t.Context(), enterTime)
	defer cancel()
	c, err := client.Dial(ctx, addr, client.Options{Export: export, Session: wire.Session{ID: [16]byte{4, 2}, Incarnation: incarnation}})
	if err == nil {
		t.Cleanup(func() { c.Abort() })
	}
	return c, err
}

// TestReconnectWithoutEtcd: a device that loses its connection while etcd hangs
// comes back at once (F4).
func TestReconnectWithoutEtcd(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	c.gateway.firn("volume", "create", "v", "64M")
	conn, err := enterAs(t, c.gateway.NBD, "v", 1)
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("firn"), 1024)
	if err := conn.Do(t.Context(), &client.Call{Command: wire.CmdWrite, Data: data}); err != nil {
		t.Fatal(err)
	}
	c.etcd.signal(syscall.SIGSTOP)
	defer c.etcd.signal(syscall.SIGCONT)
	for i := range uint64(3) {
		conn.Abort()
		begin := time.Now()
		if conn, err = enterAs(t, c.gateway.NBD, "v", 2+i); err != nil {
			t.Fatalf("the device does not come back without etcd: %v", err)
		}
		got := make([]byte, len(data))
		if err := conn.Do(t.Context(), &client.Call{Command: wire.CmdRead, Data: got}); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("read back: %v", err)
		}
		measured(t, "connected again without etcd in %.2f s", time.Since(begin).Seconds())
	}
}

// TestForcedDetachEndsISCSI: a volume that is taken away by force ends its iSCSI
// sessions, also after a rename, so that initiators log in anew, and do not keep
// a dead volume.
func TestForcedDetachEndsISCSI(t *testing.T) {
	t.Parallel()
	portal := freeAddr(t)
	s := up(t, t.TempDir(), "--volume", "v=64M", "--iscsi", portal)
	login := func(volume string) (*iscsitest.Device, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		c, err := iscsitest.Dial(ctx, portal, "iqn.2026-11.io.firn.test:a", iscsi.NamePrefix+volume)
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { c.Close() })
		return iscsitest.NewDevice(t.Context(), c)
	}
	dev, err := login("v")
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte{7}, 4096)
	if err := dev.WriteAt(t.Context(), data, 0, 0); err != nil {
		t.Fatal(err)
	}
	s.firn("volume", "rename", "v", "w")
	s.firn("detach", "w", "--force")
	if sessions := metric(t, s, "firn_iscsi_sessions"); sessions != 0 {
		t.Errorf("%v sessions are left after detach --force", sessions)
	}
	if err := dev.WriteAt(t.Context(), data, 4096, 0); err == nil {
		t.Error("the session that was cut off wrote on")
	}
	if _, err := login("w"); err == nil {
		t.Error("the volume was taken back at once")
	}
	awaitTrue(t, "the volume to be let in again", func() bool { dev, err = login("w"); return err == nil })
	got := make([]byte, len(data))
	if err := dev.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read back: %v", err)
	}
	// Without force it stays.
	if r := try(t, firnBinary, "detach", "w", "--api", s.API); r.exit != 5 {
		t.Errorf("detach with an initiator: exit %d", r.exit)
	}
}

// TestRenamedVolume: a client that has the volume under its old name is cut off by
// a forced detach, and finds it by its UUID.
func TestRenamedVolume(t *testing.T) {
	t.Parallel()
	s := up(t, t.TempDir(), "--volume", "v=64M")
	conn, err := enterAs(t, s.NBD, "v", 1)
	if err != nil {
		t.Fatal(err)
	}
	s.firn("volume", "rename", "v", "w")
	s.firn("volume", "create", "v", "64M")
	ctx, cancel := context.WithTimeout(t.Context(), infoTime)
	defer cancel()
	info, err := client.Info(ctx, s.NBD, "w")
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Do(t.Context(), &client.Call{Command: wire.CmdFlush}); err != nil {
		t.Fatalf("the volume was renamed under a client: %v", err)
	}
	if out := s.firn("detach", "w", "--force"); out != "w is detached from gateway up\n" {
		t.Errorf("detach --force: %q", out)
	}
	if err := conn.Do(t.Context(), &client.Call{Command: wire.CmdFlush}); err == nil {
		t.Error("the client that entered by the old name was not cut off")
	}
	uuid := info.Description[len("Firn volume "):]
	awaitTrue(t, "the volume to be let in again", func() bool { conn, err = enterAs(t, s.NBD, uuid, 2); return err == nil })
	if conn.Export().Description != info.Description {
		t.Errorf("entered %q by the UUID of %q", conn.Export().Description, info.Description)
	}
	if _, err := enterAs(t, s.NBD, "00000000-0000-4000-8000-000000000000", 3); err == nil {
		t.Error("a volume that is not there was entered by its UUID")
	}
}

// TestStopWithAClientThatReadsNothing: a gateway gives its volumes back and ends
// well whatever a client does.
func TestStopWithAClientThatReadsNothing(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	other := serve(t, []string{"gateway", "--json", "--id", "gw2", "--data", filepath.Join(c.dir, "gw2"), "--etcd", c.etcdURL,
		"--nbd", freeAddr(t), "--api", freeAddr(t), "--http", freeAddr(t)})
	c.gateway.firn("volume", "create", "v", "64M")
	ctx, cancel := context.WithTimeout(t.Context(), enterTime)
	defer cancel()
	nc, _, err := client.Enter(ctx, c.gateway.NBD, client.Options{Export: "v"})
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	var requests []byte
	for i := range uint64(64) {
		requests = wire.AppendRequest(requests, wire.SimpleReplies, wire.Request{Command: wire.CmdRead, Cookie: i, Length: 32 << 20})
	}
	if _, err := nc.Write(requests); err != nil {
		t.Fatal(err)
	}
	awaitTrue(t, "the requests to be in flight", func() bool { return metric(t, c.gateway, "firn_nbd_in_flight_bytes") > 32<<20 })
	begin := time.Now()
	if err := c.gateway.stop(); err != nil {
		t.Errorf("stop: %v\n%s", err, c.gateway.stderr)
	}
	measured(t, "the gateway stopped in %.2f s", time.Since(begin).Seconds())
	if out := other.firn("volume", "show", "v", "--json"); !strings.Contains(out, `"attached_to": ""`) {
		t.Errorf("the volume was not given back:\n%s", out)
	}
}

// metric is the value of a metric without labels.
func metric(t testing.TB, s *server, name string) float64 {
	t.Helper()
	_, body := httpGet("http://" + s.HTTP + "/metrics")
	for line := range strings.Lines(body) {
		if text, ok := strings.CutPrefix(line, name+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
	}
	t.Fatalf("there is no metric %s", name)
	return 0
}
