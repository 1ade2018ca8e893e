package guest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// deployed is a file of deploy/systemd.
func deployed(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("../../deploy/systemd", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// stockUnits are those of Debian's that a machine needs to come up and go down.
var stockUnits = []string{
	"basic.target", "sysinit.target", "multi-user.target", "local-fs.target", "local-fs-pre.target", "remote-fs.target", "remote-fs-pre.target",
	"network.target", "network-online.target", "network-pre.target", "sockets.target", "timers.target", "paths.target", "slices.target", "swap.target",
	"shutdown.target", "umount.target", "final.target", "poweroff.target", "systemd-poweroff.service", "rescue.target", "emergency.target",
	"systemd-fsck@.service", "blockdev@.target",
}

const (
	udevUnit = `[Unit]
DefaultDependencies=no
Before=sysinit.target
[Service]
Type=notify
ExecStart=/lib/systemd/systemd-udevd
KillMode=mixed
`
	agentUnit = `[Service]
ExecStart=/agent
`
	managerConfig = `[Manager]
DefaultStandardOutput=kmsg
DefaultStandardError=kmsg
`
)

// systemdGuest boots a guest whose first process is systemd, with what
// deploy/systemd has, for the volume db.
func systemdGuest(t testing.TB, gateway string) *Guest {
	t.Helper()
	udev, err := findPackage("udev")
	if err != nil {
		t.Fatal(err)
	}
	const units = "/lib/systemd/system/"
	cfg := Config{
		Init:     "/lib/systemd/systemd",
		Programs: []string{"systemctl", "mount", "umount", "fsck", "fsck.ext4", "mkfs.ext4", "e2fsck"},
		Modules:  []string{"nbd"},
		Files: map[string]string{
			"/bin/firn": firnBinary, "/bin/udevadm": filepath.Join(udev, "bin/udevadm"),
			"/lib/systemd/systemd": "/lib/systemd/systemd", "/lib/systemd/systemd-shutdown": "/lib/systemd/systemd-shutdown", "/lib/systemd/systemd-fsck": "/lib/systemd/systemd-fsck",
			"/lib/systemd/system-generators/systemd-fstab-generator": "/lib/systemd/system-generators/systemd-fstab-generator",
		},
		Texts: map[string]string{
			"/etc/machine-id": strings.Repeat("f1", 16) + "\n", "/etc/systemd/system.conf": managerConfig,
			"/etc/systemd/system/agent.service": agentUnit, "/etc/systemd/system/systemd-udevd.service": udevUnit,
			"/etc/systemd/system/firn-attach@.service": deployed(t, "firn-attach@.service"), "/etc/udev/rules.d/60-firn.rules": deployed(t, "60-firn.rules"),
			"/etc/fstab": deployed(t, "fstab.example"), "/etc/default/firn-attach": "FIRN_GATEWAY=" + gateway + "\n",
		},
		Links: map[string]string{
			"/etc/systemd/system/default.target": units + "multi-user.target", "/lib/systemd/systemd-udevd": "/bin/udevadm",
			"/etc/systemd/system/sysinit.target.wants/systemd-udevd.service": "../systemd-udevd.service", "/etc/systemd/system/multi-user.target.wants/agent.service": "../agent.service",
			"/etc/systemd/system/multi-user.target.wants/firn-attach@db.service": "../firn-attach@.service",
			"/etc/systemd/system/multi-user.target.wants/remote-fs.target":       units + "remote-fs.target",
		},
	}
	for _, name := range stockUnits {
		cfg.Files[units+name] = units + name
	}
	return Boot(t, cfg)
}

// awaitUnit returns when a unit is active.
func (g *Guest) awaitUnit(unit string) {
	g.t.Helper()
	g.Run("for i in $(seq 600); do systemctl is-active -q '" + unit + "' && exit 0; usleep 100000; done; systemctl --no-pager status '" + unit + "'; dmesg | tail -n 40; exit 1")
}

// powerOff ends the guest in order.
func (g *Guest) powerOff() {
	g.t.Helper()
	g.Start("systemctl poweroff")
	select {
	case <-g.exited:
	case <-time.After(quiet):
		g.t.Fatalf("the guest does not end:\n%s", g.Console(60))
	}
	if text := g.Console(200); strings.Contains(text, "I/O error") || strings.Contains(text, "EXT4-fs error") {
		g.t.Errorf("on the way down:\n%s", text)
	}
}

// TestReboot: under systemd the volume of the fstab is attached, mounted, written,
// unmounted while its process lives, and there again after the next boot; in the
// long variant what was synced is there after a power cut too.
func TestReboot(t *testing.T) {
	server := up(t, "--volume", "db=256M")
	g := systemdGuest(t, server.guestAddr())
	g.awaitUnit("firn-attach@db.service")
	if at := g.Run("readlink -f /dev/firn/db"); !strings.HasPrefix(at, "/dev/nbd") {
		t.Errorf("/dev/firn/db is %s", at)
	}
	// The boot looks for a file system, and finds none yet.
	g.Run("for i in $(seq 600); do systemctl list-jobs --no-pager 2>&1 | grep -q 'No jobs' && exit 0; usleep 100000; done; systemctl list-jobs --no-pager; exit 1")
	g.Run("mkfs.ext4 -q -F /dev/firn/db; udevadm settle; systemctl reset-failed; systemctl start srv-db.mount")
	sum := g.Run("dd if=/dev/urandom of=/srv/db/f bs=1M count=4 2>/dev/null; md5sum < /srv/db/f")
	g.powerOff()

	g = systemdGuest(t, server.guestAddr())
	g.awaitUnit("srv-db.mount")
	if got := g.Run("md5sum < /srv/db/f"); got != sum {
		t.Errorf("written before the reboot: %s, after it: %s", sum, got)
	}
	if out, _ := g.Try("dmesg | grep -iE 'recovery|EXT4-fs error|I/O error'"); out != "" {
		t.Errorf("it was not unmounted in order:\n%s", out)
	}
	// Killed, the process is started again and takes the device up.
	before := g.theAttached()
	g.Run("systemctl kill -s KILL firn-attach@db.service")
	g.Run("for i in $(seq 300); do firn attach ls --json | grep -q '\"live\": 1' && firn attach ls --json | grep -q '\"kept\": true' && ! firn attach ls --json | grep -q '\"pid\": " + strconv.Itoa(before.PID) + ",' && exit 0; usleep 100000; done; firn attach ls; dmesg | tail -n 30; exit 1")
	if a := g.theAttached(); a.Device != before.Device {
		t.Errorf("before the kill %+v, after it %+v", before, a)
	}
	synced := g.Run("dd if=/dev/urandom of=/srv/db/g bs=1M count=1 conv=fsync 2>/dev/null; md5sum < /srv/db/g")
	if long {
		g.Start("while true; do dd if=/dev/urandom of=/srv/db/more bs=64k count=64 conv=fsync 2>/dev/null; echo written; done").Await("written")
		g.Kill()
		g = systemdGuest(t, server.guestAddr())
		g.awaitUnit("srv-db.mount")
		if got := g.Run("md5sum < /srv/db/g"); got != synced {
			t.Errorf("synced before a power cut: %s, after it: %s", synced, got)
		}
	}
	g.powerOff()
}

// TestUnit: systemd finds nothing wrong in the unit, and orders the mount of the
// fstab after it.
func TestUnit(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	put := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	put("firn-attach@.service", strings.ReplaceAll(deployed(t, "firn-attach@.service"), "/usr/bin/firn", firnBinary))
	out, err := exec.Command("systemd-analyze", "verify", "--man=no", filepath.Join(dir, "firn-attach@db.service")).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	generator := exec.Command("/lib/systemd/system-generators/systemd-fstab-generator", dir, dir, dir)
	generator.Env = append(os.Environ(), "SYSTEMD_FSTAB="+put("fstab", deployed(t, "fstab.example")))
	if out, err := generator.CombinedOutput(); err != nil {
		t.Fatalf("systemd-fstab-generator: %v\n%s", err, out)
	}
	mount, err := os.ReadFile(filepath.Join(dir, "srv-db.mount"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"After=firn-attach@db.service", "Requires=firn-attach@db.service", "Before=remote-fs.target"} {
		if !strings.Contains(string(mount), want+"\n") {
			t.Errorf("the mount lacks %s:\n%s", want, mount)
		}
	}
}
