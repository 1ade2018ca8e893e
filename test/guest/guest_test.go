package guest

import (
	"strings"
	"testing"
)

// TestGuest is what the other tests rely on: exit statuses, output of commands
// side by side, modules, and programs with their libraries.
func TestGuest(t *testing.T) {
	g := Boot(t, Config{Programs: []string{"mkfs.ext4"}, Modules: []string{"nbd", "xfs"}})
	if out, exit := g.Try("echo out; echo err >&2; exit 3"); exit != 3 || out != "out\nerr\n" {
		t.Errorf("exit %d, output %q", exit, out)
	}
	if _, exit := g.Try("kill -9 $$"); exit != 128+9 {
		t.Errorf("exit %d of a killed shell", exit)
	}
	long := g.Start("echo begun; until [ -e /tmp/go ]; do usleep 50000; done; exit 1")
	long.Await("begun")
	if out := g.Run("modprobe nbd; modprobe xfs; ls /dev/nbd0; grep -c xfs /proc/filesystems"); out != "/dev/nbd0\n1" {
		t.Errorf("modules: %q", out)
	}
	g.Run("truncate -s 8M /tmp/image; mkfs.ext4 -q /tmp/image; ping -c 1 -W 5 " + HostAddr)
	if out := g.Run("dd if=/dev/zero bs=1M count=2 2>/dev/null | tr '\\0' x"); len(out) != 2<<20 || strings.Trim(out, "x") != "" {
		t.Errorf("%d bytes of a long output", len(out))
	}
	g.Run("touch /tmp/go")
	if _, exit := long.Wait(); exit != 1 {
		t.Errorf("exit %d", exit)
	}
}
