#!/bin/bash
# Two hosts on one machine, to try launches on several nodes: network namespaces `nodea` (10.77.0.1) and `nodeb`
# (10.77.0.2), joined by a cable called `wire0` on both, each with a host name, an /etc/hosts and an sshd of its own. They
# share the file system, as nodes with shared storage do.
#
#   two_hosts.sh check            say what is missing here, exit 1; exit 0 if the rest can work
#   two_hosts.sh up | down        make them; end everything on them and take them away
#   two_hosts.sh on nodea CMD...  run a command on one
#   two_hosts.sh cut | join       pull the cable of nodeb: nothing is refused, nothing answers; put it back
#   two_hosts.sh kill nodeb       kill -9 of everything that runs there
#
# HOSTS_DIR: keys, sshd's files and `hostfile` (two hosts, one slot each); the same for every call. Needs root, and
# openssh-server, openssh-client, iproute2, util-linux; pdsh for launches by hostfile.
set -u
DIR=${HOSTS_DIR:?set HOSTS_DIR to a folder for keys and logs}
mkdir -p "$DIR"
DIR=$(cd "$DIR" && pwd)
# Named after the folder, so that two people can have two hosts each.
TAG=align$(printf %s "$DIR" | cksum | cut -d' ' -f1)
declare -A ADDRESS=([nodea]=10.77.0.1 [nodeb]=10.77.0.2)
WIRE=wire0
SSH_HOME=$(getent passwd "$(id -un)" | cut -d: -f6)/.ssh # where ssh looks, whatever $HOME says

check() {
  [[ $(id -u) == 0 ]] || { echo "namespaces need root"; return 1; }
  local tool
  for tool in ip unshare nsenter ssh ssh-keygen /usr/sbin/sshd pdsh; do
    command -v $tool >/dev/null || { echo "$tool is not installed"; return 1; }
  done
  ip netns add "$TAG-probe" 2>/dev/null || { echo "network namespaces are not allowed here"; return 1; }
  ip link add "probe$$" netns "$TAG-probe" type veth peer name "peer$$" netns "$TAG-probe" 2>/dev/null
  local made=$?
  ip netns del "$TAG-probe"
  [[ $made == 0 ]] || { echo "veth pairs are not allowed here"; return 1; }
}

on() { # a command in a host's network, with its name, its /etc/hosts and its keys
  local host=$1
  shift
  exec nsenter --net="/run/netns/$TAG-$host" unshare --mount --uts bash -c '
    mount --bind "$1/ssh" "$2" && mount --bind "$1/hosts" /etc/hosts && hostname "$3" || exit 125
    shift 3; exec "$@"' _ "$DIR" "$SSH_HOME" "$host" "$@"
}

up() {
  mkdir -p "$DIR/ssh" "$SSH_HOME" /run/sshd
  chmod 700 "$DIR/ssh"
  printf '127.0.0.1 localhost\n%s nodea\n%s nodeb\n' "${ADDRESS[nodea]}" "${ADDRESS[nodeb]}" >"$DIR/hosts"
  printf 'nodea slots=1\nnodeb slots=1\n' >"$DIR/hostfile"
  [[ -f $DIR/host_key ]] || ssh-keygen -q -t ed25519 -N '' -f "$DIR/host_key"
  [[ -f $DIR/ssh/id_ed25519 ]] || ssh-keygen -q -t ed25519 -N '' -f "$DIR/ssh/id_ed25519"
  cp "$DIR/ssh/id_ed25519.pub" "$DIR/ssh/authorized_keys"
  printf 'Host *\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n' >"$DIR/ssh/config"
  chmod 600 "$DIR"/ssh/*
  local host
  for host in nodea nodeb; do ip netns add "$TAG-$host" || return 1; done
  ip link add $WIRE netns "$TAG-nodea" type veth peer name $WIRE netns "$TAG-nodeb" || return 1
  for host in nodea nodeb; do
    ip -n "$TAG-$host" addr add "${ADDRESS[$host]}/24" dev $WIRE
    ip -n "$TAG-$host" link set lo up
    ip -n "$TAG-$host" link set $WIRE up
    printf '%s\n' "ListenAddress ${ADDRESS[$host]}:22" "HostKey $DIR/host_key" "PidFile $DIR/sshd-$host.pid" \
      "AuthorizedKeysFile $DIR/ssh/authorized_keys" 'PermitRootLogin prohibit-password' \
      'PasswordAuthentication no' 'UsePAM no' 'StrictModes no' >"$DIR/sshd-$host.conf"
    (on $host /usr/sbin/sshd -f "$DIR/sshd-$host.conf" -E "$DIR/sshd-$host.log") || return 1
  done
}

end_all() { ip netns pids "$TAG-$1" 2>/dev/null | xargs -r kill -9 2>/dev/null; }

down() {
  local host
  for host in nodea nodeb; do
    end_all $host
    ip netns del "$TAG-$host" 2>/dev/null
  done
  true
}

case ${1:-} in
check) check ;;
up) up || { down; exit 1; } ;;
down) down ;;
on) shift; on "$@" ;;
cut) ip -n "$TAG-nodeb" link set $WIRE down ;;
join) ip -n "$TAG-nodeb" link set $WIRE up ;;
kill) end_all "${2:?which host}"; true ;;
*) sed -n '2,/^set/{/^#/p}' "$0" >&2; exit 2 ;;
esac
